"""Runs measured servers and Redis as child processes."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import machine

START_TIMEOUT_S = 30.0
_POLL_S = 0.002
_ROOT = Path(__file__).resolve().parents[1]


class CannotMeasure(Exception):
    """The run cannot continue; the message says what to change."""


@dataclass(frozen=True)
class Subject:
    """A server to measure: its name in the report, and its processes' Python arguments.

    Packages in `python_path` precede the installed ones.
    """

    name: str
    engine: str
    store: str
    workloads: tuple[str, ...]
    arguments: tuple[str, ...]
    processes: int = 1
    python_path: str = ""

    @property
    def base(self) -> str:
        """The name of the no-op server on the same engine."""
        return f"no-op, {self.engine}"


class Server:
    """A running subject, on its own TCP port on loopback."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.port = free_port()
        self._log = folder / f"{subject.name.replace(' ', '-').replace(',', '')}.log"
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def target(self) -> str:
        """The address, host:port."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> float:
        """Start the processes; return milliseconds until they listen. Raises CannotMeasure with the log."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DEDUP_")}
        if self.subject.python_path:
            environment["PYTHONPATH"] = self.subject.python_path
        command = [sys.executable, *self.subject.arguments, "--listen", self.target]
        begun = time.perf_counter()
        with self._log.open("ab") as log:
            for _ in range(self.subject.processes):
                self._processes.append(subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=log, env=environment))
        try:
            await_port(self.port, self._processes)
        except CannotMeasure as error:
            self.stop()
            raise CannotMeasure(f"{self.subject.name}: {error}\n{self._log.read_text()}") from None
        return (time.perf_counter() - begun) * 1_000

    def stop(self) -> None:
        """Terminate the processes and await their exit."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    @property
    def cpu_s(self) -> float:
        """The CPU seconds of its processes so far."""
        return sum(machine.cpu_s(process.pid) for process in self._processes)

    @property
    def peak_kib(self) -> int:
        """The peak resident memory of its processes."""
        return sum(machine.peak_kib(process.pid) for process in self._processes)


@dataclass(frozen=True)
class Redis:
    """A running Redis without persistence."""

    port: int
    socket_path: Path

    @property
    def tcp_url(self) -> str:
        """The URL over TCP."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """The URL over the Unix socket."""
        return f"unix://{self.socket_path}"


@contextmanager
def running_redis(folder: Path) -> Iterator[Redis]:
    """Run a Redis on a free port and a Unix socket. Raises CannotMeasure without Redis."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise CannotMeasure("redis-server is not on PATH: `apt-get install redis-server` on Debian")
    redis = Redis(free_port(), folder / "redis.sock")
    options = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--logfile", str(folder / "redis.log"))
    command = (binary, "--port", str(redis.port), "--unixsocket", str(redis.socket_path), *options)
    process = subprocess.Popen(command, cwd=folder)
    try:
        await_port(redis.port, [process])
        yield redis
    finally:
        process.terminate()
        process.wait()


def await_port(port: int, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Return when the port accepts connections. Raises CannotMeasure if a process exits, or after START_TIMEOUT_S."""
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if any(process.poll() is not None for process in processes):
            raise CannotMeasure("it exited at start")
        if time.monotonic() > end:
            raise CannotMeasure(f"it did not listen within {START_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)


def free_port() -> int:
    """Return a currently free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
