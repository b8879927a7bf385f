"""The timing of keep-alive, with an injected clock (`clients/golden/keep_alive.json`)."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dedup.keep_alive import DEFAULT_MAX_HOLD_S, Extension, KeepAlive, KeptClaim, Lease

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[2] / "golden" / "keep_alive.json").read_text())


class Clock:
    """Runs the keep-alive of one client, and answers its extensions as scripted, at once or later."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.keep_alive = KeepAlive(1.0, lambda: self.now_s)
        self.sent: list[tuple[str, float, float, float]] = []
        self.told: list[tuple[str, float]] = []
        self.answers: dict[str, Extension | None] = {}
        self.unanswered: list[Callable[[Extension], None]] = []

    def watch(self, name: str, lease_s: float, **options: Any) -> KeptClaim:
        """Keep a claim alive that was sent now."""
        every: dict[str, Any] = {"sent_s": self.now_s, "now_s": self.now_s, "jitter": lambda: 0.0} | options

        def extend(ttl_s: float, timeout_s: float, done: Callable[[Extension], None]) -> None:
            self.sent.append((name, round(self.now_s, 3), round(ttl_s, 3), round(timeout_s, 3)))
            answer = self.answers.get(name, "extended")
            if answer is None:
                self.unanswered.append(done)
            else:
                done(answer)

        kept = KeptClaim(Lease(lease_s, **every), extend, lambda: self.told.append((name, round(self.now_s, 3))))
        self.keep_alive.watch(kept)
        return kept

    def run_until(self, end_s: float) -> None:
        """Move the clock from one due time to the next."""
        while (delay_s := self.keep_alive.delay_s(self.now_s)) is not None and self.now_s + delay_s <= end_s:
            self.now_s += max(delay_s, 1e-9)
            self.keep_alive.run_due()
        self.now_s = end_s

    def times(self, name: str) -> list[float]:
        """Return when the extensions of a claim were sent."""
        return [now_s for claim, now_s, _, _ in self.sent if claim == name]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['lease_ms']}-{case['jitter']}")
def test_the_times_are_those_of_every_client(case: dict[str, float]) -> None:
    """The next extension, its repetition, and the loss."""
    lease_s = case["lease_ms"] / 1000
    lease = Lease(lease_s, sent_s=0.0, now_s=0.0, max_hold_s=math.inf, jitter=lambda: case["jitter"])
    assert lease.due_s * 1000 == pytest.approx(case["next_extension_ms"])
    assert lease.repeat_s * 1000 == pytest.approx(case["repeat_ms"])
    assert lease.lost_s * 1000 == pytest.approx(case["lost_after_ms"])
    clock = Clock()
    clock.answers["a"] = "failed"
    clock.watch("a", lease_s, max_hold_s=math.inf, jitter=lambda: case["jitter"])
    clock.run_until(lease_s)
    first, second = clock.times("a")[:2]
    assert first * 1000 == pytest.approx(case["next_extension_ms"], abs=1)
    assert (second - first) * 1000 == pytest.approx(case["repeat_ms"], abs=1)
    (name, told_s), *rest = clock.told
    assert (name, rest) == ("a", [])
    assert told_s == pytest.approx(case["lost_after_ms"] / 1000, abs=0.001)


def test_the_longest_hold_is_that_of_every_client() -> None:
    """One hour."""
    assert GOLDEN["keep_alive"]["max_hold_ms"] == DEFAULT_MAX_HOLD_S * 1000


def test_a_claim_is_extended_until_its_end() -> None:
    """Each extension counts from when it was sent, and none follows the end of the claim."""
    clock = Clock()
    kept = clock.watch("a", 60.0)
    clock.run_until(70.0)
    clock.keep_alive.end(kept)
    clock.run_until(7_200.0)
    assert clock.sent == [("a", 20.0, 60.0, 1.0), ("a", 40.0, 60.0, 1.0), ("a", 60.0, 60.0, 1.0)]
    assert clock.told == []
    assert not kept.lease.lost


def test_a_failed_extension_is_repeated_and_the_claim_recovers() -> None:
    """The lease counts from the extension that succeeded."""
    clock = Clock()
    clock.answers["a"] = "failed"
    clock.watch("a", 60.0)
    clock.run_until(37.0)
    clock.answers["a"] = "extended"
    clock.run_until(60.0)
    assert clock.times("a") == [20.0, 26.0, 32.0, 38.0, 58.0]
    assert clock.told == []


def test_an_unanswered_extension_is_repeated_meanwhile() -> None:
    """A late answer counts from when its extension was sent, and an answer after the loss does not count."""
    clock = Clock()
    clock.answers["a"] = None
    kept = clock.watch("a", 60.0)
    clock.run_until(45.0)
    assert clock.times("a") == [20.0, 26.0, 32.0, 38.0, 44.0]
    clock.unanswered[1]("extended")
    clock.run_until(77.0)
    assert clock.times("a")[5:] == [46.0, 52.0, 58.0, 64.0, 70.0, 76.0]
    assert clock.told == [("a", 80.0)] or not clock.told
    clock.run_until(90.0)
    assert clock.told == [("a", 80.0)]
    clock.unanswered[-1]("extended")
    assert kept.lease.lost
    clock.run_until(900.0)
    assert len(clock.times("a")) == 11


def test_not_held_is_a_loss_at_once() -> None:
    """It is told once, and nothing follows."""
    clock = Clock()
    clock.answers["a"] = "not_held"
    kept = clock.watch("a", 60.0)
    clock.run_until(20.001)
    assert kept.lease.lost
    clock.run_until(7_200.0)
    assert (clock.times("a"), [name for name, _ in clock.told]) == ([20.0], ["a"])


def test_no_extension_ends_after_max_hold() -> None:
    """The last one is shorter. The claim is lost a tenth of the lease before its end."""
    clock = Clock()
    clock.watch("a", 60.0, max_hold_s=90.0)
    clock.run_until(7_200.0)
    assert [(now_s, ttl_s) for _, now_s, ttl_s, _ in clock.sent] == [(20.0, 60.0), (40.0, 50.0)]
    assert clock.told == [("a", 84.0)]
    assert max(now_s + ttl_s for _, now_s, ttl_s, _ in clock.sent) == 90.0


def test_a_ttl_longer_than_max_hold_is_not_extended() -> None:
    """Nor shortened: the loss is a tenth before the end of the ttl."""
    clock = Clock()
    clock.watch("a", 7_200.0)
    clock.run_until(10_000.0)
    assert (clock.sent, clock.told) == ([], [("a", 6_480.0)])


def test_a_replayed_claim_is_extended_at_once() -> None:
    """It is older than its reply. A claim whose reply took longer than a third of the lease is extended at once too."""
    clock = Clock()
    clock.now_s = 100.0
    clock.watch("a", 60.0, replayed=True)
    clock.watch("b", 60.0, sent_s=70.0)
    clock.watch("waited", 10.0, sent_s=70.0)
    clock.keep_alive.run_due()
    assert [(name, now_s) for name, now_s, _, _ in clock.sent] == [("a", 100.0), ("b", 100.0), ("waited", 100.0)]
    clock.run_until(150.0)
    assert clock.told == []


def test_a_process_that_slept_through_the_lease_is_told_at_once() -> None:
    """No late extension hides that another caller may have worked meanwhile."""
    clock = Clock()
    clock.watch("a", 60.0)
    clock.now_s = 61.0
    clock.keep_alive.run_due()
    assert (clock.sent, clock.told) == ([], [("a", 61.0)])


def test_claims_do_not_delay_each_other() -> None:
    """An unanswered extension of one claim changes nothing for the others. Their number is not limited."""
    clock = Clock()
    clock.answers["slow"] = None
    clock.watch("slow", 60.0)
    for number in range(200):
        clock.watch(str(number), 30.0)
    clock.run_until(59.0)
    assert {tuple(clock.times(str(number))) for number in range(200)} == {(10.0, 20.0, 30.0, 40.0, 50.0)}
    assert clock.told == [("slow", 54.0)]


def test_the_end_of_the_client_is_told() -> None:
    """Nothing keeps its claims alive any more. An ended claim is not told."""
    clock = Clock()
    kept, ended = clock.watch("a", 60.0), clock.watch("b", 60.0)
    clock.keep_alive.end(ended)
    clock.keep_alive.close()
    assert clock.told == [("a", 0.0)]
    assert (kept.lease.lost, ended.lease.lost) == (True, False)


def test_a_timeout_leaves_time_for_the_loss() -> None:
    """An attempt ends with the attempt timeout of the client, or with the claim."""
    clock = Clock()
    clock.answers["a"] = "failed"
    clock.watch("a", 3.0)
    clock.run_until(3.0)
    assert [timeout_s for _, _, _, timeout_s in clock.sent] == [1.0, 1.0, 1.0, 0.8, 0.5, 0.3]
