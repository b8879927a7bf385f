"""The machine and software, and CPU time and memory of processes. Linux only."""

import datetime as dt
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PACKAGES = ("grpcio", "pygrpc-native", "protobuf", "redis", "hiredis", "uvloop")
_PROGRAMS = {
    "redis-server": ("redis-server", "--version"),
    "h2load": ("h2load", "--version"),
    "Go": ("go", "env", "GOVERSION"),
}


def describe() -> dict[str, str | int]:
    """Return hardware and versions of installed software."""
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


def cpu_s(pid: int) -> float:
    """Return the CPU seconds, user and system, of a process and its descendants, by clock ticks (10 ms)."""
    total = 0
    for each in _tree(pid):
        # A process name may contain spaces and parentheses.
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_SECOND


def peak_kib(pid: int) -> int:
    """Return the summed peak resident memory of a process and its descendants, counting shared pages each time."""
    return sum(_status_kib(each, "VmHWM") for each in _tree(pid))


def rss_kib(pid: int) -> int:
    """Return the resident memory of one process."""
    return _status_kib(pid, "VmRSS")


def _version(command: tuple[str, ...]) -> str | None:
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version = re.search(r"\d+(\.\d+)+", output)
    return version[0] if version else None


def _status_kib(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0])


def _tree(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += _tree(int(child))
    return found
