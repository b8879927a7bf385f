"""A worker process: reports readiness, takes signals, and ends."""

import asyncio
import contextlib
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence

from dedup_service.supervisor.messages import Refusal, WorkerStart, own_command, read_report


class WorkerProcess:
    """A worker from its start to its end; made by `start_worker`."""

    def __init__(self, number: int, process: Process) -> None:
        self.number = number
        self.pid = process.pid
        self.addresses: Sequence[str] = ()
        """Empty until the worker is ready."""
        self.refusal: Refusal | None = None
        """The reported refusal."""
        self._process = process
        self._started = time.monotonic()
        self._reload_due = False
        self._reported = asyncio.Event()
        self._following = asyncio.create_task(self._follow())

    @property
    def age_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    async def ended(self) -> int:
        """Wait for the end; return the exit status, negative after a signal."""
        # Shield: cancelling one waiter must not cancel the others.
        return await asyncio.shield(self._following)

    async def ready(self) -> bool:
        """Wait until it is ready or has ended; return which."""
        await self._reported.wait()
        return bool(self.addresses)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def reload(self) -> None:
        """Forward a SIGHUP once ready: earlier the signal would end the worker."""
        if self.addresses:
            self.signal(signal.SIGHUP)
        else:
            self._reload_due = True

    async def _follow(self) -> int:
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        async for line in self._process.stdout:
            report = read_report(line)
            if isinstance(report, Refusal):
                self.refusal = report
                continue
            self.addresses = report
            self._reported.set()
            if self._reload_due:
                self.signal(signal.SIGHUP)
        status = await self._process.wait()
        self._reported.set()
        return status


async def start_worker(start: WorkerStart) -> WorkerProcess:
    """Start a worker without waiting for it. Raises OSError if the system cannot start a process.

    Its own process group makes Ctrl-C in a terminal reach it once, through the supervisor. The end of its standard
    input tells it that the supervisor is gone.
    """
    process = await asyncio.create_subprocess_exec(*own_command("worker"), stdin=PIPE, stdout=PIPE, process_group=0)
    assert process.stdin is not None  # noqa: S101 - it is a pipe
    process.stdin.write(start.to_line())
    return WorkerProcess(start.number, process)


def status_text(status: int) -> str:
    """Return an exit status in words."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exited with {status}"
