"""Child processes: a real redis-server and the real service, each on a free port."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import grpc

from tests.support.polling import wait_until

# Twice that of a loaded machine.
START_TIMEOUT_S = 120.0

REDIS_MISSING = (
    "redis-server is not on PATH, and the tests require it: "
    "`apt-get install redis-server` on Debian, `brew install redis` on macOS"
)


def free_port() -> int:
    """Return a currently free port. Another process may take it first, so callers must retry a failed bind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisProcess:
    """A real redis-server on TCP and a Unix socket, without persistence unless `arguments` enable it."""

    def __init__(self, folder: Path, *arguments: str, tls: bool = False) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            raise AssertionError(REDIS_MISSING)
        self._binary = binary
        self._folder = folder
        self._arguments = arguments
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self._log = folder / "redis.log"
        self.socket_path = folder / "redis.sock"
        self.port = 0
        self.tls_port = 0

    @property
    def url(self) -> str:
        """The URL of this server over TCP."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self, port: int = 0) -> Self:
        """Start on `port` or on a free one, and return when the server answers."""
        while True:
            self.port = port or free_port()
            self.tls_port = free_port() if self._tls else 0
            self._log.unlink(missing_ok=True)
            process = self._process = subprocess.Popen([self._binary, *self._options(), *self._arguments])
            wait_until(self._answers_or_ended, START_TIMEOUT_S, "redis-server to answer")
            if process.poll() is None:
                return self
            output = self._log.read_text()
            if "Address already in use" not in output:
                raise AssertionError(f"redis-server exited at start:\n{output}")

    def _options(self) -> list[str]:
        return [
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)),
            *("--unixsocket", str(self.socket_path), "--save", "", "--appendonly", "no"),
            *("--logfile", str(self._log), "--tls-port", str(self.tls_port)),
        ]

    def _answers_or_ended(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None or self._answers()

    def _answers(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            try:
                probe.connect(("127.0.0.1", self.port))
                probe.sendall(b"PING\r\n")
                return bool(probe.recv(64))
            except OSError:
                return False

    def pause(self) -> None:
        """Suspend the process: connections stay open, but nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume the process."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill the process, even if it is suspended, and wait for its exit."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class ServiceProcess:
    """The real service, `python -m dedup_service serve`, which logs every call; `logs` has the parsed lines.

    `command` replaces `dedup_service` after `python -m`.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = ("dedup_service",),
    ) -> None:
        self.arguments = ("--listen", "127.0.0.1:0", *arguments)
        self.logs: list[dict[str, Any]] = []
        self.stderr_lines: list[str] = []
        self.stdout = ""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DEDUP_")}
        defaults = {"DEDUP_LOG_SAMPLE": "1"}
        if any(argument.startswith("sqlite:") for argument in arguments):
            # A loaded disk may take seconds to sync.
            defaults["DEDUP_STORE_TIMEOUT"] = "20s"
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command, "serve", *self.arguments],
            env=clean | defaults | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def start(self) -> Self:
        """Return when the service serves; fail with its output if it exits instead."""
        wait_until(
            lambda: self._process.poll() is not None or self.events("server_started"),
            START_TIMEOUT_S,
            "the server to start",
        )
        if not self.events("server_started"):
            self._reader.join()
            raise AssertionError(f"the service exited with {self._process.returncode}:\n{''.join(self.stderr_lines)}")
        return self

    @property
    def addresses(self) -> list[str]:
        """The addresses of its listeners."""
        addresses: list[str] = self.events("server_started")[0]["addresses"]
        return addresses

    @property
    def target(self) -> str:
        """The first address."""
        return self.addresses[0]

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def channel(self) -> grpc.Channel:
        """Return a new channel, which the caller must close."""
        return grpc.insecure_channel(self.target)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log lines of one event so far."""
        return [line for line in list(self.logs) if line.get("event") == name]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for the exit and the end of the log, and return the exit code."""
        code = self._process.wait(START_TIMEOUT_S)
        self._reader.join()
        return code

    def stop(self) -> int:
        """Send SIGTERM, and return the exit code."""
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill the service and wait for its exit."""
        self._process.kill()
        self.wait()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        assert self._process.stdout is not None
        with self._process.stderr as stderr, self._process.stdout as stdout:
            for line in stderr:
                self.stderr_lines.append(line)
                if line.startswith("{"):
                    self.logs.append(json.loads(line))
            self.stdout = stdout.read()


def run_command(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `dedup-service` with these arguments, and return the result."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DEDUP_")}
    return subprocess.run(
        [sys.executable, "-m", "dedup_service", *arguments],
        env=clean | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
