"""The verdict of the soak, on made-up samples."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.stress.soak.samples import Sample
from tests.stress.soak.verdict import Verdict, judge

BEFORE = Sample(0, 0, 60 << 20, 20, 9, 1)
CALLS = 200_000

Bytes = Callable[[int], float]


def samples_of(memory: Bytes, calls: int = CALLS) -> list[Sample]:
    """Return the samples of a soak whose memory follows a function, with the noise of an allocator."""
    rng = random.Random(20261123)
    steps = range(0, calls + 1, calls // 100)
    return [
        replace(BEFORE, seconds=step, calls=step, rss_bytes=int(memory(step) + rng.uniform(0, 1 << 20)))
        for step in steps
    ]


def verdict_of(memory: Bytes, calls: int = CALLS) -> Verdict:
    """Return the verdict on such a soak."""
    samples = samples_of(memory, calls)
    return judge(BEFORE, samples, replace(BEFORE, calls=calls))


FLAT: dict[str, Bytes] = {
    "constant": lambda _: 60 << 20,
    "constant after warm-up": lambda calls: (60 << 20) + min(calls, CALLS // 4) * 100,
    "with a peak": lambda calls: (60 << 20) + (20 << 20 if 0.7 < calls / CALLS < 0.75 else 0),
    "shrinking": lambda calls: (60 << 20) - calls * 50,
    "a few bytes for each cancelled call": lambda calls: (60 << 20) + calls * 10,
}


@pytest.mark.parametrize("name", FLAT)
def test_flat_memory_passes(name: str) -> None:
    """Warm-up, a temporary peak and growth below the limit are flat."""
    assert verdict_of(FLAT[name]).findings == []


@pytest.mark.parametrize("leaked", [50, 100, 1_000])
def test_a_leak_is_found(leaked: int) -> None:
    """Memory kept by every call is found, even if it is as little as the id of a request."""
    verdict = verdict_of(lambda calls: (60 << 20) + calls * leaked)
    assert verdict.bytes_a_call == pytest.approx(leaked, rel=0.2)
    assert len(verdict.findings) == 1


def test_a_short_soak_does_not_judge_memory() -> None:
    """With too few calls the slope is reported but not judged."""
    verdict = verdict_of(lambda calls: (60 << 20) + calls * 1_000, calls=20_000)
    assert verdict.bytes_a_call is not None
    assert (verdict.judged, verdict.findings) == (False, [])


@pytest.mark.parametrize(
    "kept", [{"file_descriptors": 25}, {"threads": 10}, {"redis_connections": 2}, {"redis_connections": None}]
)
def test_resources_kept_after_the_load_are_found(kept: dict[str, int]) -> None:
    """Descriptors, threads and Redis connections that outlive the load are findings in a soak of any length."""
    samples = samples_of(FLAT["constant"], calls=1_000)
    assert len(judge(BEFORE, samples, replace(BEFORE, calls=1_000, **kept)).findings) == 1
