"""A real PostgreSQL server on a free port and a Unix socket, which forgets everything when it stops."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from tests.support.polling import wait_until
from tests.support.processes import free_port

MISSING = (
    "PostgreSQL is not installed, and this test requires it: "
    "`apt-get install postgresql` on Debian, `brew install postgresql` on macOS"
)
_USER = "postgres"
# A cluster takes a few seconds to create.
_TIMEOUT_S = 120.0


class PostgresqlProcess:
    """A server that trusts every local user. A crash of the host may lose its data, which makes it fast."""

    def __init__(self) -> None:
        self._binaries = _binaries()
        # A short path: a Unix socket path has a limit of about 100 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="pg-"))
        self._data = self._folder / "data"
        self._log = self._folder / "postgresql.log"
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to run as root.
        self._account = _unprivileged_account() if os.geteuid() == 0 else None
        self.port = 0

    def start(self) -> Self:
        """Start on a free port, and return when the server accepts connections."""
        if self._account is not None:
            shutil.chown(self._folder, self._account)
        options = ("--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync", f"--username={_USER}")
        made = self._run("initdb", f"--pgdata={self._data}", *options)
        if made.returncode:
            raise AssertionError(f"initdb failed:\n{made.stdout}{made.stderr}")
        while True:
            self.port = free_port()
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [self._binaries / "postgres", "-D", self._data, *self._options()],
                    cwd=self._folder,
                    user=self._account,
                    stdout=log,
                    stderr=log,
                )
            wait_until(self._answers_or_ended, _TIMEOUT_S, "PostgreSQL to accept connections")
            if self._process.poll() is None:
                return self
            if "could not bind" not in self._log.read_text():
                raise AssertionError(f"PostgreSQL exited at start:\n{self._log.read_text()}")

    def stop(self) -> None:
        """End the server with its connections, and delete its data."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
        shutil.rmtree(self._folder)

    def url(self, port: int = 0) -> str:
        """Return the URL of the server over TCP; `port` is that of a proxy before it."""
        return f"postgresql://{_USER}@127.0.0.1:{port or self.port}/postgres?sslmode=disable"

    def query(self, statement: str) -> list[list[str]]:
        """Run a statement, and return its rows as text."""
        options = ("--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--field-separator=\t")
        done = self._run(
            *("psql", *options, "--set=ON_ERROR_STOP=1", f"--username={_USER}", f"--host={self._folder}"),
            *(f"--port={self.port}", "--dbname=postgres", f"--command={statement}"),
        )
        if done.returncode:
            raise AssertionError(done.stderr)
        return [line.split("\t") for line in done.stdout.splitlines()]

    def _options(self) -> list[str]:
        return [
            *("-p", str(self.port), "-h", "127.0.0.1", "-k", str(self._folder)),
            *("-c", "fsync=off", "-c", "full_page_writes=off", "-c", "synchronous_commit=off"),
        ]

    def _answers_or_ended(self) -> bool:
        assert self._process is not None
        ready = self._run("pg_isready", "--quiet", f"--host={self._folder}", f"--port={self.port}")
        return self._process.poll() is not None or ready.returncode == 0

    def _run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._binaries / name, *arguments],
            cwd=self._folder,
            user=self._account,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )


def _binaries() -> Path:
    """Return the folder of the newest installed programs, which Debian leaves off PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    on_path = shutil.which("postgres")
    if not found and on_path is None:
        raise AssertionError(MISSING)
    return found[-1].parent if found else Path(str(on_path)).resolve().parent


def _unprivileged_account() -> str:
    accounts = {account.pw_name for account in pwd.getpwall()}
    return next(name for name in (_USER, "nobody") if name in accounts)
