"""Notices what Redis has forgotten: a count that only grows is kept there, and the last one acknowledged here.

Each process has a count of its own on each server. A flush and an empty restart take it away; a restart from an older
state and a failover that lost writes take it back. What happened between two looks may go unnoticed.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dedup_service.claims import StoreNotice
from dedup_service.stores.redis.channel import RedisChannel
from dedup_service.stores.redis.link import RedisLink

_LIFE_MS = 3_600_000
# Beyond this the count may have expired.
_SURELY_KEPT_S = 0.5 * _LIFE_MS / 1000


@dataclass(slots=True)
class _Memory:
    sent: int = 0
    acknowledged: int = 0
    acknowledged_at: float = 0.0
    server: str = ""
    run_id: str | None = None
    refused: bool = False


class RedisCanary:
    """Compares what a server remembers with what it acknowledged; `prefix` begins keys that no transaction has."""

    def __init__(self, prefix: bytes, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._prefix = prefix + secrets.token_hex(8).encode()
        self._monotonic = monotonic
        self._memories: dict[bytes, _Memory] = {}
        self._notices: list[StoreNotice] = []

    def take_notices(self) -> Sequence[StoreNotice]:
        """Return what was noticed since the last time."""
        notices, self._notices = self._notices, []
        return notices

    def look(self, mark: bytes, link: RedisLink, channel: RedisChannel) -> None:
        """Count on at the place of this mark, and wait for nothing: what is noticed is there to be taken later."""
        memory = self._memories.setdefault(mark, _Memory())
        self._notices += _changed(memory, link)
        memory.sent += 1
        answer = channel.send("SET", self._prefix + mark, str(memory.sent), "GET", "PX", _LIFE_MS)
        answer.add_done_callback(partial(self._compare, memory, memory.sent))

    def _compare(self, memory: _Memory, count: int, answer: asyncio.Future[Any]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            # A server that is away is nothing to notice.
            return
        reply = answer.result()
        if reply is not None and not (isinstance(reply, bytes) and reply.isdigit()):
            # Out of memory, read-only and the like pass; a right that is missing says itself once.
            if str(reply).startswith("NOPERM") and not memory.refused:
                memory.refused = True
                self._notices.append(
                    StoreNotice("canary_write_refused", f"forgotten claims go unnoticed, since Redis refused: {reply}")
                )
            return
        found, now = int(reply or 0), self._monotonic()
        age_s = now - memory.acknowledged_at
        if found < memory.acknowledged and age_s < _SURELY_KEPT_S:
            self._notices.append(_forgotten(memory, found, age_s))
        memory.acknowledged, memory.acknowledged_at = count, now


def _forgotten(memory: _Memory, found: int, age_s: float) -> StoreNotice:
    if not found:
        how = "nothing is left of what was acknowledged {} s ago, as after a flush or a restart without persistence"
    else:
        how = "it is back at a state before what was acknowledged {} s ago, as after a failover or restart with losses"
    return StoreNotice(
        "claims_forgotten",
        f"Redis at {memory.server} has forgotten claims, which can be claimed again: {how.format(f'{age_s:.1f}')}",
        forgot=True,
    )


def _changed(memory: _Memory, link: RedisLink) -> Sequence[StoreNotice]:
    server, run_id = str(link.server), link.run_id
    before, memory.server, memory.run_id = (memory.server, memory.run_id), server, run_id
    if not before[0] or before == (server, run_id):
        return ()
    if before[0] != server:
        return (
            StoreNotice(
                "store_moved",
                f"claims are taken by Redis at {server} now, and were by {before[0]}: what that one acknowledged and "
                "this one had not received is lost",
                restarted=True,
            ),
        )
    return (
        StoreNotice(
            "store_restarted",
            f"Redis at {server} has restarted or was replaced: what it had not saved is lost",
            restarted=True,
        ),
    )
