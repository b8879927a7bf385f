"""The Python programs in the README and the documentation print what their pages show."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import ServiceProcess

ROOT = Path(__file__).parents[3]
PROGRAM = re.compile(r"```python\n(.+?)```\n\nRun twice it prints\n\n```\n(.+?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/other-languages.md"])
def test_a_program_prints_the_output_on_its_page(
    page: str, start_service: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    """The program of a page, run twice against a fresh service, prints the output that follows it."""
    match = PROGRAM.search((ROOT / page).read_text())
    assert match is not None
    service = start_service("--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    code = match[1].replace("127.0.0.1:50051", service.target)
    printed = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
        for _ in range(2)
    ]
    assert "".join(printed) == match[2]
