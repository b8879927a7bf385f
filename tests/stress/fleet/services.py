"""The services of the fleet: processes of `examples/rewards` in every language, on free ports."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.polling import wait_until

ROOT = Path(__file__).parents[3]
TOOLS = ("go", "npm")
"""What builds the services that are not in Python."""

_EXAMPLES = ROOT / "examples/rewards"
_GO_BINARY = ROOT / "build/fleet/rewards"
_START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Program:
    """How to start a service, and the tool that builds it; none for Python."""

    command: Sequence[str]
    tool: str = ""


def _python(file: str) -> Program:
    return Program((str(_EXAMPLES / "python" / file),))


def _node(file: str) -> Program:
    return Program(("node", str(_EXAMPLES / "node" / file)), "npm")


PROGRAMS = {
    "fastapi": _python("fastapi_service.py"),
    "flask": _python("flask_service.py"),
    "django": _python("django_service.py"),
    "go": Program((str(_GO_BINARY),), "go"),
    "express": _node("express.js"),
    "fastify": _node("fastify.js"),
}


def build(tool: str) -> bool:
    """Build the services that need this tool. Return False if it is missing."""
    if shutil.which(tool) is None:
        return False
    if tool == "go":
        _run("go", "build", "-o", str(_GO_BINARY), ".", folder=_EXAMPLES / "go")
    else:
        for folder in (ROOT / "clients/node", _EXAMPLES / "node"):
            _install(folder)
        _run("npm", "run", "build", folder=ROOT / "clients/node")
    return True


def _install(folder: Path) -> None:
    """Install the locked packages of a folder, unless they are."""
    installed = folder / "node_modules/.package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (folder / "package-lock.json").stat().st_mtime:
        _run("npm", "ci", "--no-audit", "--no-fund", folder=folder)


def _run(*command: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


class Service:
    """One process, which can be killed and started again. It listens on another port after each start.

    `mutation` removes a protection from a service in Python.
    """

    def __init__(self, name: str, environment: Mapping[str, str], log: Path, mutation: str = "") -> None:
        self.name = name
        program = PROGRAMS[name]
        self._command = list(program.command)
        if not program.tool:
            mutants = ("-m", "tests.stress.fleet.mutants", mutation)
            self._command = [sys.executable, *(mutants if mutation else ()), *self._command]
        self._environment = os.environ | environment | {"PORT": "0", "NAME": name}
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self, tries: int = 1) -> Self:
        """Return when the process listens; fail with its output if it exits instead, `tries` times."""
        for _ in range(tries):
            if address := self._try_to_start():
                self.url = f"http://{address}"
                return self
        raise AssertionError(f"{self.name} exited at start:\n{self._log.read_text()}")

    def _try_to_start(self) -> str:
        """Return the address of the process; empty if it exits instead."""
        with self._log.open("a") as log:
            process = self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        lines: list[str] = []
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        wait_until(lambda: lines or process.poll() is not None, _START_TIMEOUT_S, f"{self.name} to listen")
        return lines[0].removeprefix("listening on ").strip() if lines else ""

    def kill(self) -> None:
        """Kill the process with SIGKILL, and wait for its exit."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
    """Read to the end, so that the process never waits for a reader."""
    assert process.stdout is not None
    with process.stdout as output:
        lines.extend(output)
