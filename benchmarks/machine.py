"""The machine and the software that were measured, as the report names them."""

import datetime as dt
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = ("grpcio", "pygrpc-native", "protobuf", "redis", "hiredis", "uvloop")
_PROGRAMS = {
    "redis-server": ("redis-server", "--version"),
    "h2load": ("h2load", "--version"),
    "Go": ("go", "env", "GOVERSION"),
}


def describe() -> dict[str, str | int]:
    """Return what the figures depend on; what is not installed is left out."""
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    found: dict[str, str | int] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "CPU": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory[1]) / 2**20) if memory else 0,
        "kernel": platform.release(),
        "Python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    for name, command in _PROGRAMS.items():
        if version := _version(command):
            found[name] = version
    return found


def _version(command: tuple[str, ...]) -> str | None:
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version = re.search(r"\d+(\.\d+)+", output)
    return version[0] if version else None
