"""Whether a service kept flat: the rules, over samples of it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tests.stress.soak.samples import Sample

MAX_BYTES_A_CALL = 32.0
"""What memory may grow by with each call of the second half. The least that a request could leave behind is more, and
what grpcio keeps of a cancelled call (docs/guarantees.md) is less once it is spread over the calls of the mix."""

JUDGED_CALLS = 50_000
"""With fewer calls in the second half its slope says more about the allocator than about the service."""

# The metrics page and the health of the machine may each take one for a moment.
_SPARE = 2


@dataclass(frozen=True)
class Verdict:
    """What the samples came to; flat when nothing was found."""

    bytes_a_call: float | None
    """The Theil-Sen slope of the memory in the second half, or None where it is not judged."""
    judged: bool
    findings: list[str]


def judge(before: Sample, samples: Sequence[Sample], after: Sample) -> Verdict:
    """Return the verdict over samples under load, and one each from before the load and after it.

    Memory may grow by `MAX_BYTES_A_CALL`, with `JUDGED_CALLS` to judge it by. File descriptors and connections to Redis
    have to be those of before once the load has gone, and threads no more than in the first half.
    """
    second_half = [sample for sample in samples if sample.calls > after.calls / 2]
    judged = len(second_half) > 1 and second_half[-1].calls - second_half[0].calls >= JUDGED_CALLS
    slope = theil_sen([(sample.calls, sample.rss_bytes) for sample in second_half])
    findings = kept(before, samples, after)
    if judged and slope is not None and slope > MAX_BYTES_A_CALL:
        findings.append(f"memory grows by {slope:.1f} bytes a call, of {MAX_BYTES_A_CALL:.0f} allowed")
    return Verdict(slope, judged, findings)


def kept(before: Sample, samples: Sequence[Sample], after: Sample) -> list[str]:
    """Return what, besides memory, a service has after the load and should have given back."""
    findings = []
    if after.file_descriptors > before.file_descriptors + _SPARE:
        findings.append(f"{before.file_descriptors} file descriptors before, and {after.file_descriptors} after")
    if after.redis_connections != before.redis_connections:
        findings.append(f"{before.redis_connections} connections to Redis before, and {after.redis_connections} after")
    first_half = [sample.threads for sample in samples if sample.calls <= after.calls / 2]
    if after.threads > max(first_half, default=after.threads):
        findings.append(f"at most {max(first_half)} threads in the first half, and {after.threads} after")
    return findings


def theil_sen(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the median of the slopes of all pairs of points, which outliers do not move; None without a pair."""
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x1 != x2]
    return statistics.median(slopes) if slopes else None
