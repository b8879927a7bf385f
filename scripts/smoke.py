#!/usr/bin/env python3
"""Installs a clean copy of this tree as a stranger would, starts the service, and claims one transaction twice."""
# ruff: noqa: S603, S607
# It runs the tools under test and reports to a terminal.

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
PATIENCE = 30.0  # Seconds; a start takes about one, and a loaded machine several.

# Settings of the caller's shell would make this another installation than a stranger's.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("DEDUP_", "PYTHON"))}


def copy_tree(destination: Path) -> None:
    """Copy what a commit of this tree would hold, so that no forgotten or ignored file props up the installation."""
    listing = subprocess.check_output(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT)
    for name in os.fsdecode(listing).split("\0"):
        source = ROOT / name
        if source.is_file():  # Git still lists a file that was deleted and not yet committed.
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, destination / name)


def await_address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Return the address that the server's log says it serves at."""
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines(keepends=True):
            if (
                line.startswith("{")
                and line.endswith("\n")
                and (event := json.loads(line))["event"] == "server_started"
            ):
                return str(event["addresses"][0])
        time.sleep(0.05)
    sys.exit(f"smoke: the server did not say where it serves; its log:\n{log.read_text()}")


def main() -> None:
    """Run the whole story; the first step that goes wrong ends it with a message."""
    # An interrupted run must not leave its server behind, whichever signal interrupts it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("smoke: stopped"))
    with tempfile.TemporaryDirectory(prefix="dedup-smoke-") as folder:
        scene = Path(folder)
        print("smoke: installing a clean copy…", flush=True)
        copy_tree(scene / "tree")
        venv.create(scene / "venv", with_pip=True)
        binaries = f"{scene}/venv/bin"
        service = f"{binaries}/dedup-service"
        pip_install = [f"{binaries}/pip", "install", "--quiet", "--disable-pip-version-check", f"{scene}/tree"]
        subprocess.run(pip_install, env=ENVIRONMENT, cwd=scene, check=True, timeout=600)

        def expect(exit_code: int, *arguments: str) -> None:
            ended = subprocess.run([service, *arguments], env=ENVIRONMENT, cwd=scene, check=False, timeout=PATIENCE)
            if ended.returncode != exit_code:
                sys.exit(f"smoke: `{' '.join(arguments)}` ended with {ended.returncode}, not {exit_code}")

        expect(0, "--version")
        log = scene / "server.log"
        serve = [service, "serve", "--listen", "127.0.0.1:0", "--store-url", f"sqlite:{scene}/claims.db"]
        with log.open("wb") as stderr, subprocess.Popen(serve, env=ENVIRONMENT, cwd=scene, stderr=stderr) as server:
            try:
                claim = ["claim", "smoke:1", "--target", await_address(server, log), "--json"]
                expect(0, *claim)  # claimed
                expect(3, *claim)  # a duplicate
                server.send_signal(signal.SIGTERM)
                if server.wait(PATIENCE) != 0:
                    sys.exit(f"smoke: the server ended with {server.returncode}; its log:\n{log.read_text()}")
            finally:
                server.kill()
    print("smoke: passed")


if __name__ == "__main__":
    main()
