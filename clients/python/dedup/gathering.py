"""Decides which claims travel together, by docs/client-contract.md#coalescing. Knows no threads, loops or clocks."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

CROWD = 4
"""The number of claims in flight from which further claims wait for each other."""

MAX_BATCH = 100
"""The service works on as many claims at a time."""

MAX_DELAY_S = 0.001
"""The longest wait of a claim."""

BATCH_TIMEOUT_SHARE = 1 / 4
"""The part of the attempt timeout that a batch may take."""

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0

MAX_CLAIM_BYTES = 1_024
"""More than any valid claim has."""

C = TypeVar("C")


@dataclass(frozen=True, slots=True, eq=False)
class GatheredCall(Generic[C]):
    """A call to make: a batch, or one claim alone."""

    claims: list[C]
    round: int
    failures: int


@dataclass(slots=True)
class Gathering(Generic[C]):
    """The claims that wait, and what is in flight. Times are in seconds, by one clock."""

    waiting: list[C] = field(default_factory=list)
    together: bool = False
    """Whether the last call was a batch: claims answered together are mostly followed by others."""
    _in_flight: int = 0
    """Claims in calls of this round."""
    _round: int = 0
    """A new one begins when the calls in flight turn out to be slow."""
    _pause_s: float = 0.0
    """After the last batch that failed; 0 after a good one."""
    _resume_at: float = 0.0
    _trying: bool = False
    """Whether the first batch after the pause is in flight."""
    _failures: int = 0
    """Batches that failed, so that those in flight at the same time count once."""

    def admits(self, now: float) -> bool:
        """Return whether a claim may be gathered now. Otherwise it travels alone."""
        return not self._pause_s or (now >= self._resume_at and not self._trying)

    def add(self, claim: C) -> GatheredCall[C] | None:
        """Add a claim. Return the batch that it fills."""
        self.waiting.append(claim)
        return self._leave() if len(self.waiting) >= MAX_BATCH else None

    @property
    def crowded(self) -> bool:
        """Whether claims wait for a call in flight."""
        return self._in_flight >= CROWD

    def settle(self) -> GatheredCall[C] | None:
        """Return the call to make after the claims of one moment were added."""
        return None if self.crowded or not self.waiting else self._leave()

    def ended(self, call: GatheredCall[C], now: float, *, failed: bool = False) -> GatheredCall[C] | None:
        """Return the call to make after another has ended. `failed`: a batch that failed as a whole."""
        if len(call.claims) > 1 and call.failures == self._failures:
            self._trying = False
            if failed:
                self._failures += 1
                self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
                self._resume_at = now + self._pause_s
            else:
                self._pause_s = 0.0
        if call.round == self._round:
            self._in_flight -= len(call.claims)
        return self.settle()

    def expired(self) -> GatheredCall[C] | None:
        """Return the call to make after the longest wait. The calls in flight no longer hold claims back."""
        self._in_flight = 0
        self._round += 1
        return self.settle()

    def _leave(self) -> GatheredCall[C]:
        call = GatheredCall(self.waiting, self._round, self._failures)
        self.waiting = []
        self._in_flight += len(call.claims)
        self.together = len(call.claims) > 1
        self._trying = self._trying or (self._pause_s > 0 and self.together)
        return call
