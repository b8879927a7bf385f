"""Detects that Redis lost data: a counter grows there, and this process remembers the last acknowledged count.

Each process has its own counter on each server. A flush and an empty restart remove it; a restart from an older state
and a failover with losses set it back. A loss between two looks can go undetected.
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
_MAX_DIGITS = 20
# After this the counter may have expired.
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
    """Compares the counter of each server with the count it acknowledged; no transaction has keys with `prefix`."""

    def __init__(self, prefix: bytes, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._prefix = prefix + secrets.token_hex(8).encode()
        self._monotonic = monotonic
        self._memories: dict[bytes, _Memory] = {}
        self._notices: list[StoreNotice] = []

    def take_notices(self) -> Sequence[StoreNotice]:
        """Return the notices since the last call."""
        notices, self._notices = self._notices, []
        return notices

    def look(self, hash_tag: bytes, link: RedisLink, channel: RedisChannel) -> None:
        """Increment the counter of the server with this hash tag, without awaiting the reply; see `take_notices`."""
        memory = self._memories.setdefault(hash_tag, _Memory())
        self._notices += _changed(memory, link)
        memory.sent += 1
        answer = channel.send("SET", self._prefix + hash_tag, str(memory.sent), "GET", "PX", _LIFE_MS, past_limit=True)
        answer.add_done_callback(partial(self._compare, memory, memory.sent))

    def _compare(self, memory: _Memory, count: int, answer: asyncio.Future[Any]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            # An unreachable server has not necessarily lost data.
            return
        reply = answer.result()
        if reply is not None and not (isinstance(reply, bytes) and reply.isdigit() and len(reply) < _MAX_DIGITS):
            # Out of memory, read-only and the like are temporary; a missing right is reported once.
            if str(reply).startswith("NOPERM") and not memory.refused:
                memory.refused = True
                self._notices.append(
                    StoreNotice(
                        "canary_write_refused",
                        f"lost claims cannot be detected, since Redis refused ({reply}): allow SET on "
                        f"{self._prefix.decode(errors='replace')}*",
                    )
                )
            return
        found, now = int(reply or 0), self._monotonic()
        age_s = now - memory.acknowledged_at
        if found < memory.acknowledged and age_s < _SURELY_KEPT_S:
            self._notices.append(_forgotten(memory, found, age_s))
        memory.acknowledged, memory.acknowledged_at = count, now


def _forgotten(memory: _Memory, found: int, age_s: float) -> StoreNotice:
    if not found:
        how = "everything acknowledged {} s ago is gone, as after a flush or a restart without persistence"
    else:
        how = "its state is older than {} s ago, as after a failover or a restart with losses"
    return StoreNotice(
        "claims_forgotten",
        f"Redis at {memory.server} has lost claims, which can be claimed again: {how.format(f'{age_s:.1f}')}",
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
                f"claims moved from Redis at {before[0]} to Redis at {server}: claims which the first had not "
                "replicated to the second are lost",
                restarted=True,
            ),
        )
    return (
        StoreNotice(
            "store_restarted",
            f"Redis at {server} has restarted or was replaced: claims it had not saved are lost",
            restarted=True,
        ),
    )
