"""Keep-alive: extends claims while their work runs, and tells the work when a claim is lost.

`Lease` and `KeepAlive` decide, without threads or event loops. `ThreadKeepAlive` and `LoopKeepAlive` drive them.
"""

import asyncio
import heapq
import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

DEFAULT_MAX_HOLD_S = 3_600.0

_EXTENSION_SHARE = 1 / 3
_LONGEST_JITTER = 0.1
_REPEAT_SHARE = 1 / 10
_SHORTEST_REPEAT_S = 0.05
_LOSS_MARGIN_SHARE = 1 / 10

Extension = Literal["extended", "not_held", "failed"]
"""The outcome of one attempt to extend a claim."""


class Lease:
    """The lease of one claim, in seconds of the caller's monotonic clock.

    It ends `lease_s` after the last successful claim or extension was sent. `due_s` is when `step` must be called.
    """

    def __init__(
        self,
        lease_s: float,
        *,
        sent_s: float,
        now_s: float,
        replayed: bool = False,
        max_hold_s: float = DEFAULT_MAX_HOLD_S,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.lost = False
        self.ended = False
        self._lease_s = lease_s
        self._jitter = jitter
        self._hold_end_s = sent_s + max_hold_s
        self._end_s = sent_s + lease_s
        self.due_s = self._next_extension_s(sent_s)
        # A replayed claim is older than its reply. A claim that waited is younger, so it is tried before it is lost.
        self._try_first = replayed or self.due_s <= now_s
        if self._try_first:
            self.due_s = now_s

    @property
    def lost_s(self) -> float:
        """When the claim is lost unless it is extended."""
        return self._end_s - self._lease_s * _LOSS_MARGIN_SHARE

    @property
    def repeat_s(self) -> float:
        """How long after a failed extension the next one is sent."""
        return max(_SHORTEST_REPEAT_S, self._lease_s * _REPEAT_SHARE)

    def step(self, now_s: float) -> float | None:
        """Return the ttl of an extension to send now, if any, and set the next `due_s`. May set `lost`."""
        first, self._try_first = self._try_first, False
        if now_s >= self.lost_s and not first:
            self.lost = True
            return None
        ttl_s = min(self._lease_s, self._hold_end_s - now_s)
        if ttl_s < self._lease_s and now_s + ttl_s <= self._end_s:
            # max_hold allows no later end.
            self.due_s = max(now_s, self.lost_s)
            return None
        self.due_s = now_s + self.repeat_s
        if self.lost_s > now_s:
            self.due_s = min(self.due_s, self.lost_s)
        return ttl_s

    def extended(self, sent_s: float, ttl_s: float) -> None:
        """Record that an extension sent at `sent_s` succeeded."""
        if sent_s + ttl_s >= self._end_s:
            self._end_s = sent_s + ttl_s
            self.due_s = min(self._next_extension_s(sent_s), self.lost_s)

    def _next_extension_s(self, sent_s: float) -> float:
        return sent_s + self._lease_s * _EXTENSION_SHARE * (1.0 - _LONGEST_JITTER * self._jitter())


@dataclass(eq=False, slots=True)
class KeptClaim:
    """A claim to keep alive.

    `extend` starts one attempt with a ttl and a timeout in seconds, and later calls back with its outcome. It must not
    block. `tell` notifies the work of the loss.
    """

    lease: Lease
    extend: Callable[[float, float, Callable[[Extension], None]], None]
    tell: Callable[[], None]


class KeepAlive:
    """Keeps the claims of one client alive. Subclasses decide when `run_due` runs. It is thread-safe."""

    def __init__(self, attempt_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._attempt_timeout_s = attempt_timeout_s
        self._lock = threading.RLock()
        self._queue: list[tuple[float, int, KeptClaim]] = []
        self._numbers = itertools.count()

    def watch(self, kept: KeptClaim) -> None:
        """Keep a claim alive until `end`, its loss, or `close`."""
        with self._lock:
            self._push(kept)

    def end(self, kept: KeptClaim) -> None:
        """Stop extending a claim. It cannot be lost any more."""
        with self._lock:
            kept.lease.ended = True

    def close(self) -> None:
        """Stop extending. The work of each claim is told, because nothing keeps it alive any more."""
        with self._lock:
            queue, self._queue = self._queue, []
            # A claim may be queued twice.
            kept_claims = {id(kept): kept for _, _, kept in queue if not kept.lease.ended}
            for kept in kept_claims.values():
                kept.lease.lost = kept.lease.ended = True
            self._wake()
        for kept in kept_claims.values():
            kept.tell()

    def run_due(self) -> None:
        """Start the extensions that are due, and then tell the work of lost claims."""
        now_s = self.clock()
        extensions: list[tuple[KeptClaim, float, float]] = []
        lost: list[KeptClaim] = []
        with self._lock:
            while (delay_s := self.delay_s(now_s)) is not None and delay_s <= 0:
                _, _, kept = heapq.heappop(self._queue)
                lease = kept.lease
                ttl_s = None if lease.lost else lease.step(now_s)
                if lease.lost:
                    lease.ended = True
                    lost.append(kept)
                    continue
                if ttl_s is not None:
                    timeout_s = min(self._attempt_timeout_s, max(lease.lost_s - now_s, lease.repeat_s))
                    extensions.append((kept, ttl_s, timeout_s))
                self._push(kept)
        for kept, ttl_s, timeout_s in extensions:
            kept.extend(ttl_s, timeout_s, partial(self._answered, kept, now_s, ttl_s))
        for kept in lost:
            kept.tell()

    def delay_s(self, now_s: float) -> float | None:
        """Return the time until `run_due` has something to do, or None."""
        with self._lock:
            while self._queue:
                due_s, _, kept = self._queue[0]
                if not kept.lease.ended and due_s == kept.lease.due_s:
                    return due_s - now_s
                heapq.heappop(self._queue)
            return None

    def _answered(self, kept: KeptClaim, sent_s: float, ttl_s: float, outcome: Extension) -> None:
        with self._lock:
            lease = kept.lease
            if lease.ended or lease.lost or outcome == "failed":
                return
            if outcome == "extended":
                lease.extended(sent_s, ttl_s)
            else:
                lease.lost = True
                lease.due_s = sent_s
            self._push(kept)

    def _push(self, kept: KeptClaim) -> None:
        """Queue a claim under its `due_s`, which replaces its earlier entries."""
        entry = (kept.lease.due_s, next(self._numbers), kept)
        heapq.heappush(self._queue, entry)
        if self._queue[0] is entry:
            self._wake()

    def _wake(self) -> None:
        """Called under the lock when the first claim changed."""


class ThreadKeepAlive(KeepAlive):
    """Runs in one daemon thread, which exists while there are claims to keep alive."""

    def __init__(self, attempt_timeout_s: float) -> None:
        super().__init__(attempt_timeout_s)
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None

    def _wake(self) -> None:
        # Also dead after a fork.
        if self._queue and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, name="dedup-keep-alive", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._lock:
                delay_s = self.delay_s(self.clock())
                if delay_s is None:
                    self._thread = None
                    return
                if delay_s > 0:
                    self._changed.wait(delay_s)
            self.run_due()


class LoopKeepAlive(KeepAlive):
    """Runs in the event loop of its client, by one timer."""

    def __init__(self, attempt_timeout_s: float) -> None:
        super().__init__(attempt_timeout_s)
        self._timer: asyncio.TimerHandle | None = None

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = self.delay_s(self.clock())
        self._timer = None if delay_s is None else asyncio.get_running_loop().call_later(max(0.0, delay_s), self._fire)

    def _fire(self) -> None:
        self.run_due()
        self._wake()
