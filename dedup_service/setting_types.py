"""What an operator may write for a setting: durations, numbers of processes, and the names of the engines."""

import os
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dedup_service.durations import format_duration, parse_duration

_MAX_DURATION_MS = 36_500 * 86_400_000
_MAX_WORKERS = 64


def duration_setting(text: str) -> int:
    """Return the milliseconds of a duration that an operator wrote, at most a hundred years; raise ValueError."""
    milliseconds = parse_duration(text)
    # A protobuf time ends with the year 9999, so that a claim beyond it would be made and then not be told.
    if milliseconds > _MAX_DURATION_MS:
        raise ValueError(f"{text!r} is too long: write at most {format_duration(_MAX_DURATION_MS)}")
    return milliseconds


def _duration(value: object) -> object:
    return duration_setting(value) if isinstance(value, str) else value


def _worker_count(value: object) -> object:
    if value == "auto":
        return min(_usable_cpus(), _MAX_WORKERS)
    if isinstance(value, bool) or not str(value).isdecimal() or not 1 <= int(str(value)) <= _MAX_WORKERS:
        raise ValueError(f"{value!r} is no number of processes: write 1 to {_MAX_WORKERS}, or auto for one a CPU")
    return value


def _usable_cpus() -> int:
    # The CPUs that this process may run on, where the system says: a host may have more.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


DurationMs = Annotated[int, BeforeValidator(_duration), Field(gt=0)]
# The outer validator is what the command line knows a duration by.
OptionalDurationMs = Annotated[DurationMs | None, BeforeValidator(_duration)]
EngineName = Literal["grpcio", "native"]
WorkerCount = Annotated[int, BeforeValidator(_worker_count)]
