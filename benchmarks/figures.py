"""The arithmetic behind every figure that is reported: percentiles, spreads over rounds, and paired ratios."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """One figure over all rounds."""

    median: float
    low: float
    high: float


def percentile(ordered: Sequence[int], percent: float) -> int:
    """Return the smallest of the ascending values that at least `percent` of them do not exceed (the nearest rank).

    Always a value that was seen, never one between two. Raises ValueError for no values.
    """
    if not ordered:
        raise ValueError("no values: nothing was measured")
    # 99.9 % of 41,000 is a little above 40,959 in floating point, and the next rank another value.
    rank = math.ceil(round(len(ordered) * percent / 100, 6))
    return ordered[max(rank, 1) - 1]


def spread(values: Sequence[float]) -> Spread:
    """Return median, least and greatest of a figure over the rounds; raise ValueError for no rounds."""
    if not values:
        raise ValueError("no rounds: nothing was measured")
    return Spread(statistics.median(values), min(values), max(values))


def paired_ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the spread of each round's value over the base of the same round.

    The rounds are paired since a machine that slows down slows both. Raises ValueError when their numbers differ, or
    when a base is zero.
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} rounds cannot be paired with {len(base)}: they are not from one run")
    if not all(base):
        raise ValueError("a base of zero calls: the load generator did not reach its server")
    return spread([value / under for value, under in zip(values, base, strict=True)])
