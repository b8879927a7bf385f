"""What Linux knows of a process and its children: CPU time and peak memory."""

import os
from pathlib import Path

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """Return the process and all its living descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += tree(int(child))
    return found


def cpu_s(pid: int) -> float:
    """Return the CPU seconds, user and system, that the tree has used, to a clock tick (10 ms)."""
    total = 0
    for each in tree(pid):
        # The name in brackets may contain blanks and brackets.
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS_A_SECOND


def peak_kib(pid: int) -> int:
    """Return the sum of the peaks of resident memory of the tree; what its processes share counts for each."""
    total = 0
    for each in tree(pid):
        status = Path(f"/proc/{each}/status").read_text()
        total += int(status.partition("VmHWM:")[2].split()[0])
    return total
