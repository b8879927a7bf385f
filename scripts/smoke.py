#!/usr/bin/env python3
"""Install a clean copy of this tree with plain pip, claim one transaction twice, and uninstall."""
# ruff: noqa: S603, S607
# Runs the tools under test and prints to a terminal.

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 30.0  # Seconds. A start takes about one, several under load.

# The caller's settings would change the installation.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("DEDUP_", "PYTHON"))}

# Run by the new environment's Python, outside the tree.
SHIP_NO_COMMON_FILE = """
from importlib.metadata import files
common = {str(file) for file in files("dedup-service")} & {str(file) for file in files("dedup-client")}
assert not common, f"both distributions ship {sorted(common)}"
"""
CLIENT_IMPORTS = """
from importlib.util import find_spec
import dedup.aio, dedup.testing, dedup.v1.dedup_pb2_grpc
dedup.Client("127.0.0.1:1").close()
assert find_spec("dedup_service") is None, "dedup_service is still importable"
"""
SERVER_IS_WHOLE = """
from importlib.metadata import files
from importlib.util import find_spec
missing = [str(file) for file in files("dedup-service") if not file.locate().is_file()]
assert not missing, f"uninstalling dedup-client removed {missing}"
assert find_spec("dedup") is None, "dedup is still importable"
import dedup_service
"""


def copy_tree(destination: Path) -> None:
    """Copy tracked and unignored files; ignored ones cannot affect the installation."""
    listing = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT)
    for name in os.fsdecode(listing).split("\0"):
        source = ROOT / name
        if source.is_file():  # Git lists deleted files until the commit.
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, destination / name)


def await_address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Return the first address in the server's log."""
    deadline = time.monotonic() + TIMEOUT
    while server.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines(keepends=True):
            if (
                line.startswith("{")
                and line.endswith("\n")
                and (event := json.loads(line))["event"] == "server_started"
            ):
                return str(event["addresses"][0])
        time.sleep(0.05)
    sys.exit(f"smoke: the server did not log its address; its log:\n{log.read_text()}")


class Installation:
    """A new environment with a clean copy of this tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "tree"
        self.binaries = folder / "venv" / "bin"
        copy_tree(self.tree)
        venv.create(folder / "venv", with_pip=True)
        self.install()

    def run(self, command: str, *arguments: str | Path, timeout: float = TIMEOUT) -> int:
        """Run a command of the environment and return its exit code."""
        whole = [self.binaries / command, *arguments]
        return subprocess.run(whole, env=ENVIRONMENT, cwd=self.folder, check=False, timeout=timeout).returncode

    def expect(self, exit_code: int, command: str, *arguments: str | Path, timeout: float = TIMEOUT) -> None:
        """Run a command of the environment; exit unless its code is this."""
        if (ended := self.run(command, *arguments, timeout=timeout)) != exit_code:
            sys.exit(f"smoke: `{command} {' '.join(map(str, arguments))}` ended with {ended}, not {exit_code}")

    def install(self) -> None:
        """Run the documented line, `pip install ./clients/python .`."""
        quiet = ("--quiet", "--disable-pip-version-check")
        self.expect(0, "pip", "install", *quiet, self.tree / "clients" / "python", self.tree, timeout=600)

    def uninstall(self, distribution: str) -> None:
        """Uninstall one distribution."""
        self.expect(0, "pip", "uninstall", "--quiet", "--yes", distribution, timeout=120)


def claim_twice(installed: Installation) -> None:
    """Start the service; a claim is claimed, and its repetition a duplicate."""
    installed.expect(0, "dedup-service", "--version")
    log = installed.folder / "server.log"
    store = f"sqlite:{installed.folder}/claims.db"
    service = str(installed.binaries / "dedup-service")
    serve = [service, "serve", "--listen", "127.0.0.1:0", "--store-url", store]
    with (
        log.open("wb") as stderr,
        subprocess.Popen(serve, env=ENVIRONMENT, cwd=installed.folder, stderr=stderr) as server,
    ):
        try:
            claim = ["claim", "smoke:1", "--target", await_address(server, log), "--json"]
            installed.expect(0, "dedup-service", *claim)  # Claimed.
            installed.expect(3, "dedup-service", *claim)  # A duplicate.
            server.send_signal(signal.SIGTERM)
            if server.wait(TIMEOUT) != 0:
                sys.exit(f"smoke: the server ended with {server.returncode}; its log:\n{log.read_text()}")
        finally:
            server.kill()


def uninstall_each(installed: Installation) -> None:
    """Uninstall each distribution; the other stays whole."""
    installed.expect(0, "python", "-c", SHIP_NO_COMMON_FILE)
    installed.uninstall("dedup-service")
    installed.expect(0, "python", "-c", CLIENT_IMPORTS)
    installed.install()
    installed.uninstall("dedup-client")
    installed.expect(0, "python", "-c", SERVER_IS_WHOLE)


def main() -> None:
    """Run all steps; the first failure ends the run with a message."""
    # SIGTERM must not leave the server running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("smoke: stopped"))
    with tempfile.TemporaryDirectory(prefix="dedup-smoke-") as folder:
        print("smoke: installing a clean copy…", flush=True)
        installed = Installation(Path(folder))
        print("smoke: claiming twice…", flush=True)
        claim_twice(installed)
        print("smoke: uninstalling each distribution…", flush=True)
        uninstall_each(installed)
    print("smoke: passed")


if __name__ == "__main__":
    main()
