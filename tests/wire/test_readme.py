"""The README's example does what the README says."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from harness.processes import ServiceProcess

README = Path(__file__).parents[2] / "README.md"


def test_the_example_prints_what_the_readme_says(start_service: Callable[..., ServiceProcess], tmp_path: Path) -> None:
    """The Python example, run twice against a fresh service, prints the lines that follow it."""
    match = re.search(r"```python\n(.+?)```\n\nRun twice it prints\n\n```\n(.+?)```", README.read_text(), re.DOTALL)
    assert match is not None
    service = start_service("--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    code = match[1].replace("127.0.0.1:50051", service.target)
    printed = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
        for _ in range(2)
    ]
    assert "".join(printed) == match[2]
