"""What the processes of one service tell each other: one line of JSON each, over pipes."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Self


@dataclass(frozen=True, slots=True)
class SupervisorOrders:
    """What the supervisor is started with: the settings as `Settings.to_json` wrote them."""

    settings: str
    banner: bool

    def to_line(self) -> bytes:
        """Return one line."""
        return _line(asdict(self))

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Read what `to_line` wrote."""
        return cls(**json.loads(line))


@dataclass(frozen=True, slots=True)
class WorkerOrders:
    """What a worker is started with.

    No two workers that live at a time have the same `number`. Its figures are files in `figures_folder`, where there is
    one.
    """

    number: int
    settings: str
    figures_folder: str | None = None

    def to_line(self) -> bytes:
        """Return one line."""
        return _line(asdict(self))

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Read what `to_line` wrote."""
        return cls(**json.loads(line))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a worker cannot serve: one sentence for the operator, and the exit code that belongs to it."""

    sentence: str
    exit_code: int


def serving_line(addresses: list[str]) -> bytes:
    """Return what a worker says when it accepts calls."""
    return _line({"serving": addresses})


def refusal_line(refusal: Refusal) -> bytes:
    """Return what a worker says before it ends because it cannot serve."""
    return _line({"refusal": asdict(refusal)})


def read_line(line: bytes) -> Refusal | list[str]:
    """Return what a worker said: its refusal, or the addresses on which it serves."""
    message: dict[str, Any] = json.loads(line)
    if "refusal" in message:
        return Refusal(**message["refusal"])
    addresses: list[str] = message["serving"]
    return addresses


def python_command(module: str) -> list[str]:
    """Return the command that runs a module of this package in another process, with the same Python."""
    # `-m` would look for modules in the current folder first, which the installed command does not.
    safe = [] if "" in sys.path or os.getcwd() in sys.path else ["-P"]  # noqa: PTH109 - sys.path holds text
    return [sys.executable, *safe, "-m", module]


def become_supervisor(orders: SupervisorOrders) -> NoReturn:
    """Replace this process, all that it has imported and its standard input by the supervisor of the workers.

    The orders go through a pipe, since other users of the host can read a command line.
    """
    reader, writer = os.pipe()
    os.write(writer, orders.to_line())
    os.close(writer)
    os.dup2(reader, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    command = python_command("dedup_service.supervisor")
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
