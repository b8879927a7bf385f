"""Durations as text (`250ms`, `60s`, `2h`, `7d`) and as integer milliseconds."""

import re

UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

# Protobuf timestamps end with the year 9999; a later claim could be stored but not reported.
MAX_DURATION_MS = 36_500 * UNITS_MS["d"]

_DURATION = re.compile(r"([0-9]{1,15})(ms|s|m|h|d)")


def parse_duration(text: str) -> int:
    """Return the milliseconds of a whole number and a unit (ms, s, m, h, d), at most 100 years.

    Raises ValueError with a readable sentence.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write a whole number and a unit, such as 250ms, 60s, 2h or 7d")
    milliseconds = int(match[1]) * UNITS_MS[match[2]]
    if milliseconds > MAX_DURATION_MS:
        raise ValueError(f"{text!r} is too long: write at most {format_duration(MAX_DURATION_MS)}")
    return milliseconds


def format_duration(milliseconds: int) -> str:
    """Return the text that `parse_duration` accepts, in the largest exact unit."""
    for unit in ("d", "h", "s"):
        if milliseconds and milliseconds % UNITS_MS[unit] == 0:
            return f"{milliseconds // UNITS_MS[unit]}{unit}"
    return f"{milliseconds}ms"
