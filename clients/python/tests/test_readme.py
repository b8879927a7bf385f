"""The README's examples print what the README says, and pass mypy."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import ServiceProcess

CLIENT = Path(__file__).parents[1]
README = (CLIENT / "README.md").read_text()

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


def test_every_example_passes_mypy(tmp_path: Path) -> None:
    """A user who copies an example into a project with `mypy --strict` gets no error."""
    for number, (code, _, _) in enumerate(PROGRAMS):
        (tmp_path / f"example_{number}.py").write_text(code)
    files = sorted(path.name for path in tmp_path.glob("*.py"))
    # No configuration of this repository applies, except where the client's types are.
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={CLIENT / '.mypy_cache'}"]
    environment = os.environ | {"MYPYPATH": str(CLIENT)}
    checked = subprocess.run(
        [*command, *files], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_example_is_found() -> None:
    """None is passed over, and every printed one is compared."""
    assert len(PROGRAMS) == README.count("```python")
    assert sum(bool(how) for _, how, _ in PROGRAMS) == README.count("t prints\n")
