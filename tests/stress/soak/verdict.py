"""The verdict: whether resource use stayed flat."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tests.stress.soak.samples import Sample

MAX_BYTES_A_CALL = 32.0
"""Allowed memory growth for each call of the second half. Any leak of a request is larger. What grpcio leaks for each
cancelled call (docs/guarantees.md) is smaller, averaged over all calls."""

JUDGED_CALLS = 50_000
"""With fewer calls in the second half, the slope shows the allocator rather than the service."""

# The metrics scrape and readiness checks may each hold one for a moment.
_SPARE = 2


@dataclass(frozen=True)
class Verdict:
    """The verdict on samples; flat if there are no findings."""

    bytes_a_call: float | None
    """The Theil-Sen slope of memory in the second half, or None without two samples there."""
    judged: bool
    findings: list[str]


def judge(before: Sample, samples: Sequence[Sample], after: Sample) -> Verdict:
    """Return the verdict on samples under load, and one each from before and after it.

    Memory may grow by `MAX_BYTES_A_CALL`, judged from `JUDGED_CALLS` on. After the load, file descriptors and Redis
    connections must be back to their previous number, and threads must not exceed the maximum of the first half.
    """
    second_half = [sample for sample in samples if sample.calls > after.calls / 2]
    judged = len(second_half) > 1 and second_half[-1].calls - second_half[0].calls >= JUDGED_CALLS
    slope = theil_sen([(sample.calls, sample.rss_bytes) for sample in second_half])
    findings = kept(before, samples, after)
    if judged and slope is not None and slope > MAX_BYTES_A_CALL:
        findings.append(f"memory grows by {slope:.1f} bytes a call; the limit is {MAX_BYTES_A_CALL:.0f}")
    return Verdict(slope, judged, findings)


def kept(before: Sample, samples: Sequence[Sample], after: Sample) -> list[str]:
    """Return the resources besides memory that the service still holds after the load."""
    findings = []
    if after.file_descriptors > before.file_descriptors + _SPARE:
        findings.append(f"file descriptors: {before.file_descriptors} before, {after.file_descriptors} after")
    if after.redis_connections != before.redis_connections:
        findings.append(f"Redis connections: {before.redis_connections} before, {after.redis_connections} after")
    first_half = [sample.threads for sample in samples if sample.calls <= after.calls / 2]
    if after.threads > max(first_half, default=after.threads):
        findings.append(f"threads: at most {max(first_half)} in the first half, {after.threads} after")
    return findings


def theil_sen(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the median slope of all pairs of points, which is robust to outliers; None without a pair."""
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2]
    return statistics.median(slopes) if slopes else None
