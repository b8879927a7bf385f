"""One worker as its supervisor sees it: a process that says when it serves, takes signals, and ends."""

import asyncio
import contextlib
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence

from dedup_service.supervisor.messages import Refusal, WorkerOrders, python_command, read_line

WORKER_MODULE = "dedup_service.server.worker"


class WorkerProcess:
    """A worker from its start to its end; made by `start_worker`."""

    def __init__(self, number: int, process: Process) -> None:
        self.number = number
        self.pid = process.pid
        self.addresses: Sequence[str] = ()
        """Where it serves; empty until it does."""
        self.refusal: Refusal | None = None
        """Why it cannot serve, if it said so."""
        self._process = process
        self._began = time.monotonic()
        self._reload_due = False
        self._spoke = asyncio.Event()
        self._following = asyncio.create_task(self._follow())

    @property
    def lived_s(self) -> float:
        """The seconds since its start."""
        return time.monotonic() - self._began

    async def ended(self) -> int:
        """Wait for its end, and return its exit status; negative when a signal ended it."""
        # Who is cancelled meanwhile must not take the others' answer along.
        return await asyncio.shield(self._following)

    async def serves(self) -> bool:
        """Wait until it serves or has ended, and say which."""
        await self._spoke.wait()
        return bool(self.addresses)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def reload(self) -> None:
        """Hand a SIGHUP on: now, or as soon as it serves, since before that the signal would end it."""
        if self.addresses:
            self.signal(signal.SIGHUP)
        else:
            self._reload_due = True

    async def _follow(self) -> int:
        assert self._process.stdout is not None  # noqa: S101 - it was asked for as a pipe
        async for line in self._process.stdout:
            said = read_line(line)
            if isinstance(said, Refusal):
                self.refusal = said
                continue
            self.addresses = said
            self._spoke.set()
            if self._reload_due:
                self.signal(signal.SIGHUP)
        status = await self._process.wait()
        self._spoke.set()
        return status


async def start_worker(orders: WorkerOrders) -> WorkerProcess:
    """Start a worker, and wait for nothing. Raises OSError when the system has no room for a process.

    In a process group of its own, so that Ctrl-C in a terminal reaches it once, by way of the supervisor. Its standard
    input stays open: the end of it tells the worker that its supervisor is gone.
    """
    process = await asyncio.create_subprocess_exec(
        *python_command(WORKER_MODULE), stdin=PIPE, stdout=PIPE, process_group=0
    )
    assert process.stdin is not None  # noqa: S101 - as above
    process.stdin.write(orders.to_line())
    return WorkerProcess(orders.number, process)


def status_text(status: int) -> str:
    """Return an exit status in words."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exited with {status}"
