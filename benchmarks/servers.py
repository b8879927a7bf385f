"""The servers that are measured: the service, its no-op, the naive peer, and a Redis of the run's own."""

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

from benchmarks import process_figures

START_TIMEOUT_S = 30.0
_POLL_S = 0.002


class CannotMeasure(Exception):
    """The run cannot go on; the message is one sentence that says what to change."""


@dataclass(frozen=True)
class Subject:
    """One server to measure: its name in the report, and how each of its processes is started.

    What is in the folder `python_path` goes before what is installed.
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
        """The name of the no-op on the same engine."""
        return f"no-op, {self.engine}"


class Server:
    """A subject that runs, on a TCP port of its own on loopback."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.port = free_port()
        self._log = folder / f"{subject.name.replace(' ', '-').replace(',', '')}.log"
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def target(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> float:
        """Start it, and return the milliseconds until it accepted a connection; raise CannotMeasure with its log."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DEDUP_")}
        if self.subject.python_path:
            paths = (self.subject.python_path, environment.get("PYTHONPATH", ""))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, *self.subject.arguments, "--listen", self.target]
        begun = time.perf_counter()
        with self._log.open("ab") as log:
            for _ in range(self.subject.processes):
                self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        try:
            await_port(self.port, self._processes)
        except CannotMeasure as error:
            self.stop()
            raise CannotMeasure(f"{self.subject.name}: {error}\n{self._log.read_text()}") from None
        return (time.perf_counter() - begun) * 1_000

    def stop(self) -> None:
        """End it and wait for that."""
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
        """The CPU seconds that its processes have used."""
        return sum(process_figures.cpu_s(process.pid) for process in self._processes)

    @property
    def peak_kib(self) -> int:
        """The peak of their resident memory."""
        return sum(process_figures.peak_kib(process.pid) for process in self._processes)


@dataclass(frozen=True)
class Redis:
    """A running Redis, without persistence."""

    port: int
    socket_path: Path

    @property
    def tcp_url(self) -> str:
        """Its URL over TCP."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        """Its URL over the Unix socket."""
        return f"unix://{self.socket_path}"


@contextmanager
def running_redis(folder: Path) -> Iterator[Redis]:
    """Run a Redis of its own on a free port and a Unix socket; raise CannotMeasure where none is installed."""
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
    """Return when the port accepts connections; raise CannotMeasure when a process ended instead, or at the limit."""
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if any(process.poll() is not None for process in processes):
            raise CannotMeasure("it ended at its start")
        if time.monotonic() > end:
            raise CannotMeasure(f"it did not listen within {START_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
