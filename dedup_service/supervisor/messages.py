"""Messages between supervisor and workers: one line of JSON each, over pipes."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, Self


@dataclass(frozen=True, slots=True)
class SupervisorStart:
    """The first message to the supervisor; `settings` comes from `Settings.to_json`."""

    settings: str
    banner: bool

    def to_line(self) -> bytes:
        """Return one line."""
        return _line(asdict(self))

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Parse the output of `to_line`."""
        return cls(**json.loads(line))


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """The first message to a worker. Live workers have different `number`s."""

    number: int
    settings: str
    metrics_folder: str | None = None

    def to_line(self) -> bytes:
        """Return one line."""
        return _line(asdict(self))

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Parse the output of `to_line`."""
        return cls(**json.loads(line))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a worker cannot serve: a sentence for the operator, and the exit code."""

    sentence: str
    exit_code: int


def ready_line(addresses: list[str]) -> bytes:
    """Return the report of a worker that accepts calls."""
    return _line({"ready": addresses})


def refusal_line(refusal: Refusal) -> bytes:
    """Return the report of a worker that cannot serve."""
    return _line({"refusal": asdict(refusal)})


def read_report(line: bytes) -> Refusal | list[str]:
    """Return a report's refusal, or the addresses the worker serves."""
    message: dict[str, Any] = json.loads(line)
    if "refusal" in message:
        return Refusal(**message["refusal"])
    addresses: list[str] = message["ready"]
    return addresses


def own_command(process: str) -> list[str]:
    """Return the command line of another process of this service: `supervisor` or `worker`."""
    # `-m`, unlike the installed command, looks for modules in the current folder first.
    safe = [] if "" in sys.path or os.getcwd() in sys.path else ["-P"]  # noqa: PTH109 - sys.path holds text
    return [sys.executable, *safe, "-m", "dedup_service", process]


def become_supervisor(start: SupervisorStart) -> NoReturn:
    """Replace this process by the supervisor, without its imports.

    The message goes through a pipe: other users of the host can read a command line.
    """
    reader, writer = os.pipe()
    os.write(writer, start.to_line())
    os.close(writer)
    os.dup2(reader, 0)
    sys.stdout.flush()
    sys.stderr.flush()
    command = own_command("supervisor")
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
