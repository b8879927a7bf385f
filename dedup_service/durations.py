"""Durations as people write them (`250ms`, `60s`, `2h`, `7d`) and as the code counts them: integer milliseconds."""

import re

UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

_DURATION = re.compile(r"([0-9]{1,15})(ms|s|m|h|d)")


def parse_duration(text: str) -> int:
    """Return the milliseconds that `text` says, a whole number with one of the units ms, s, m, h and d.

    Raises ValueError with a sentence for people when `text` is anything else.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write a whole number and a unit, such as 250ms, 60s, 2h or 7d")
    return int(match[1]) * UNITS_MS[match[2]]


def format_duration(milliseconds: int) -> str:
    """Return a text that `parse_duration` reads back as `milliseconds`: whole days, hours, seconds or milliseconds."""
    for unit in ("d", "h", "s"):
        if milliseconds and milliseconds % UNITS_MS[unit] == 0:
            return f"{milliseconds // UNITS_MS[unit]}{unit}"
    return f"{milliseconds}ms"
