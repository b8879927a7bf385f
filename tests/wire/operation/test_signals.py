"""Signals from the first line of a process to its last: none is lost, and none ends it with a traceback."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from dedup_service.config.settings import load_settings
from dedup_service.supervisor.messages import WorkerStart
from tests.support.polling import wait_until

ENOUGH_S = 120
PROCESS_1 = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")

# Loaded by every Python process with its folder on PYTHONPATH: a signal at the import of a module, in one of them.
SIGNAL_AT_IMPORT = """
import os, sys

process, module, number = os.environ["SIGNAL_AT_IMPORT"].split(" ")

class Finder:
    def find_spec(self, name, path, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(number))

if process in sys.orig_argv:
    sys.meta_path.insert(0, Finder())
"""

# What is started, the process that sends itself the signal, and the import at which it does.
POINTS = [
    ("serve", "serve", "dedup_service.cli.serve"),
    ("serve", "serve", "grpc"),
    ("serve", "serve", "dedup_service.stores.sqlite"),
    # Becomes the supervisor after that.
    ("supervisor", "serve", "dedup_service.supervisor.messages"),
    ("supervisor", "supervisor", "dedup_service.supervisor.process"),
    ("supervisor", "supervisor", "dedup_service.supervisor.worker_process"),
    ("worker", "worker", "dedup_service.server.process"),
    ("worker", "worker", "dedup_service.stores.sqlite"),
]


class Server:
    """A server process that is not yet ready, and its log."""

    def __init__(self, process: str, folder: Path, wrapper: Sequence[str] = (), signal_at: str = "") -> None:
        self._folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SIGNAL_AT_IMPORT if signal_at else "")
        url = f"sqlite://{folder / 'claims.db'}"
        arguments = ["worker"] if process == "worker" else ["serve", "--listen", "127.0.0.1:0", "--store-url", url]
        if process == "supervisor":
            arguments += ["--workers", "2"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DEDUP_")}
        environment |= {"PYTHONPATH": str(folder), "SIGNAL_AT_IMPORT": signal_at}
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", "dedup_service", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment,
            )
        if process == "worker":
            settings = load_settings({"listen": "127.0.0.1:0", "store_url": url})
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(WorkerStart(1, settings.to_json()).to_line())
                self._process.stdin.flush()

    def text(self) -> str:
        """Return what it wrote to standard error so far."""
        return self._log.read_text()

    def until_logged(self, event: str) -> None:
        """Return when it has logged an event; fail if it ends before."""
        wait_until(lambda: event in self.text() or self._process.poll() is not None, ENOUGH_S, event)
        assert event in self.text(), self.text()

    def until_signals_are_handled(self) -> None:
        """Return when it no longer has the default action for SIGTERM."""
        status = Path(f"/proc/{self._process.pid}/status")
        bit = 1 << (signal.SIGTERM - 1)
        wait_until(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) & bit, ENOUGH_S, "a handler")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def ends_well(self) -> None:
        """Wait for its end; fail unless it exits with 0 and without a traceback."""
        code = self._process.wait(ENOUGH_S)
        assert (code, "Traceback" in self.text()) == (0, False), self.text()

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()


Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers, each in a folder of its own, and kills them after the test."""
    servers: list[Server] = []

    def start(process: str, *wrapper: str, signal_at: str = "") -> Server:
        servers.append(Server(process, tmp_path / str(len(servers)), wrapper, signal_at))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.mark.parametrize(
    ("process", "sender", "module", "number"),
    [
        pytest.param(*point, number, marks=[] if index % 2 == turn else pytest.mark.nightly)
        for index, point in enumerate(POINTS)
        for turn, number in enumerate((signal.SIGTERM, signal.SIGINT))
    ],
)
def test_a_signal_during_the_start_ends_it_well(
    start: Start, process: str, sender: str, module: str, number: signal.Signals
) -> None:
    """A server that receives SIGTERM or SIGINT before it serves exits with 0 and without a traceback.

    Protections: signals are remembered from the first line, kept for the next program, and end the start.
    """
    start(process, signal_at=f"{sender} {module} {number}").ends_well()


@pytest.mark.parametrize(("process", "sender", "module"), POINTS)
def test_sighup_during_the_start_is_remembered(start: Start, process: str, sender: str, module: str) -> None:
    """A server that receives SIGHUP before it serves starts all the same."""
    server = start(process, signal_at=f"{sender} {module} {signal.SIGHUP}")
    server.until_logged("worker_ready" if process == "worker" else "server_started")
    server.signal(signal.SIGTERM)
    server.ends_well()


def test_sighup_reaches_workers_that_have_not_run_a_line_yet(start: Start) -> None:
    """A worker that receives SIGHUP while its interpreter starts remembers it.

    Protection: workers begin with their signals blocked.
    """
    server = start("supervisor")
    server.until_logged("worker_spawned")
    while "worker_ready" not in server.text():
        server.signal(signal.SIGHUP)
        time.sleep(0.01)
    server.until_logged("server_started")
    server.signal(signal.SIGTERM)
    server.ends_well()


def test_sigusr2_during_the_start_of_the_supervisor_is_remembered(start: Start) -> None:
    """The workers are replaced once they are ready."""
    server = start("supervisor", signal_at=f"serve dedup_service.supervisor.messages {signal.SIGUSR2}")
    server.until_logged("workers_replaced")
    server.signal(signal.SIGTERM)
    server.ends_well()


@pytest.mark.parametrize(("process", "sender", "module"), [POINTS[0], POINTS[3], POINTS[6]])
def test_process_1_ends_at_an_early_signal(start: Start, process: str, sender: str, module: str) -> None:
    """The first process of a container, to which the kernel delivers no signal without a handler, ends as others do."""
    if subprocess.run([*PROCESS_1, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not create a PID namespace: run the tests as root")
    start(process, *PROCESS_1, signal_at=f"{sender} {module} {signal.SIGTERM}").ends_well()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which signals a process handles")
@pytest.mark.parametrize("process", ["serve", "supervisor", "worker"])
@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM, signal.SIGINT), pytest.param((signal.SIGTERM, signal.SIGINT) * 8, marks=pytest.mark.nightly)],
    ids=len,
)
def test_signals_at_any_moment_of_the_start(start: Start, process: str, signals: tuple[signal.Signals, ...]) -> None:
    """Whenever SIGTERM arrives after the first line of the program, and however often, the exit code is 0."""
    chance = random.Random(20261130)
    for number in signals:
        server = start(process)
        server.until_signals_are_handled()
        for _ in range(2):
            time.sleep(chance.uniform(0, 1.5))
            server.signal(number)
        server.ends_well()
