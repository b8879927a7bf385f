"""The README's examples do what the README says."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import ServiceProcess

README = (Path(__file__).parents[1] / "README.md").read_text()

# A program, and the text that follows it where the README says what it prints, once or in two runs.
PROGRAMS = re.findall(
    r"```python\n(.+?)```(?:\n\n(Run twice it prints|It prints)\n\n```\n(.+?)```)?", README, re.DOTALL
)


@pytest.mark.parametrize(("code", "how", "expected"), PROGRAMS, ids=range(len(PROGRAMS)))
def test_an_example_prints_what_the_readme_says(
    start_service: Callable[..., ServiceProcess], tmp_path: Path, code: str, how: str, expected: str
) -> None:
    """Each program runs as it stands, against a fresh service."""
    service = start_service("--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    program = [sys.executable, "-W", "error", "-c", code.replace("127.0.0.1:50051", service.target)]
    runs = 2 if how.startswith("Run twice") else 1
    printed = [
        subprocess.run(program, capture_output=True, text=True, check=True, timeout=60).stdout for _ in range(runs)
    ]
    assert "".join(printed) == expected


def test_every_example_is_found() -> None:
    """None is passed over, and every printed one is compared."""
    assert len(PROGRAMS) == README.count("```python")
    assert sum(bool(how) for _, how, _ in PROGRAMS) == README.count("t prints\n")
