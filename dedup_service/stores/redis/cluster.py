"""Finds the Redis Cluster master that holds a key, and keeps a link to each master.

The slot map is refreshed once a second, and at once after a MOVED reply. Failure detection and failover are the
cluster's job.
"""

import asyncio
import contextlib
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any

from redis import exceptions
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from dedup_service.claims import Applied, ConnectionObserver, Reason, StoreRefused, StoreUnavailable
from dedup_service.stores.redis.connection import new_connection, parse_info
from dedup_service.stores.redis.link import FixedServer, RedisLink, cancelled, shutting_down, unexpected_failure
from dedup_service.stores.redis.url import ClusterTarget, RedisTarget

_REFRESH_S = 1.0
_HURRIED_REFRESH_S = 0.1
_POINTED_AT_S = 10.0

_REDIRECTION = re.compile(r"(?:MOVED|ASK) (\d+) (\S*):(\d+)(?:@\d+)?")

SlotRange = tuple[int, int, RedisTarget]


class ClusterNodes:
    """The masters of a cluster, by the slot map of the first node that reports a working cluster."""

    def __init__(
        self, target: ClusterTarget, timeout_ms: int, min_replicas: int = 0, observer: ConnectionObserver | None = None
    ) -> None:
        self._target = target
        self._timeout_ms = timeout_ms
        self._min_replicas = min_replicas
        self._observer = observer
        self._links: dict[RedisTarget, RedisLink] = {}
        self._slots: list[RedisLink | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        # Each master with the hash tag of its first slot.
        self._masters: list[tuple[bytes, RedisLink]] = []
        # Time of the last redirection to each server, in loop time.
        self._pointed_at: dict[RedisTarget, float] = {}
        # The next refresh begins with the last node that answered.
        self._order: Sequence[RedisTarget] = target.nodes
        self._failure: StoreUnavailable | StoreRefused | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._closings: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Implement RedisNodes."""
        await self._refresh()
        self._keeper = asyncio.get_running_loop().create_task(self._keep())
        try:
            if isinstance(self._failure, StoreRefused):
                raise self._failure
            for link in list(self._links.values()):
                with contextlib.suppress(StoreUnavailable):
                    await link.connected()
        except StoreRefused:
            await self.close()
            raise

    async def close(self) -> None:
        """Implement RedisNodes."""
        keeper, self._keeper = self._keeper, None
        await cancelled(keeper)
        links, self._links = self._links, {}
        self._slots = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._masters = []
        self._failure = shutting_down()
        await asyncio.gather(*(link.close() for link in links.values()), *self._closings, return_exceptions=True)

    def link_of(self, key: bytes) -> RedisLink:
        """Implement RedisNodes."""
        link = self._slots[key_slot(key)]
        if link is None:
            raise self._unserved()
        return link

    def masters(self) -> Sequence[tuple[bytes, RedisLink]]:
        """Implement RedisNodes."""
        if not self._masters:
            raise self._unserved()
        return self._masters

    def redirected(self, key: bytes, link: RedisLink, reply: str) -> RedisLink | None:
        """Implement RedisNodes."""
        found = _REDIRECTION.match(reply)
        if found is None or link.server is None or self._keeper is None:
            return None
        # Without a host, a redirection means the sender's host.
        server = replace(link.server, host=found[2] or link.server.host, port=int(found[3]))
        target = self._link_to(server)
        self._pointed_at[server] = asyncio.get_running_loop().time()
        if reply.startswith("MOVED"):
            self._slots[key_slot(key)] = target
            self._hurry.set()
        return target

    def _unserved(self) -> StoreUnavailable | StoreRefused:
        failure = self._failure
        if isinstance(failure, StoreRefused):
            return StoreRefused(str(failure))
        if failure is not None:
            return failure.with_applied(Applied.NO)
        return StoreUnavailable(
            Reason.STORE_CLUSTER_DOWN,
            "no server of the Redis cluster holds this key now: check it with redis-cli --cluster check",
            Applied.NO,
        )

    async def _keep(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_S):
                    await self._hurry.wait()
                    # A reshard moves many slots; one refresh covers them all.
                    await asyncio.sleep(_HURRIED_REFRESH_S)
            self._hurry.clear()
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            await self._ask_nodes()
        except Exception as error:  # noqa: BLE001 - without its keeper the map would stay as it is for ever
            self._failure = unexpected_failure("refreshing the slot map of the Redis cluster", error)

    async def _ask_nodes(self) -> None:
        failures: list[str] = []
        refusal: StoreRefused | None = None
        for number, node in enumerate(self._order):
            try:
                state, ranges = await cluster_map(node, self._timeout_ms / 1000)
            except StoreRefused as error:
                refusal = error
                continue
            except Exception as error:  # noqa: BLE001 - the next node may answer
                failures.append(f"{node.address}: {error or type(error).__name__}")
                continue
            if state.get("cluster_state") != "ok":
                failures.append(f"{node.address}: it reports that the cluster is down")
                continue
            self._failure = None
            self._adopt(ranges)
            known = dict.fromkeys((*self._order[number:], *self._order[:number], *(server for *_, server in ranges)))
            # Drop nodes that left, except those in the URL.
            self._order = [node for node in known if node in self._links or node in self._target.nodes]
            return
        # Keep the links: the masters may still answer.
        self._failure = refusal or StoreUnavailable(
            Reason.CLUSTER_UNREACHABLE,
            f"none of the {len(failures)} nodes asked returned the slot map of the Redis cluster, check that they run "
            f"and can be reached ({'; '.join(failures)})",
            Applied.NO,
        )

    def _adopt(self, ranges: Sequence[SlotRange]) -> None:
        slots: list[RedisLink | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        lowest: dict[RedisTarget, int] = {}
        for first, last, server in ranges:
            slots[first : last + 1] = [self._link_to(server)] * (last + 1 - first)
            lowest[server] = min(first, lowest.get(server, first))
        self._slots = slots
        self._masters = [(hash_tag_of(slot), self._links[server]) for server, slot in lowest.items()]
        # A new master serves its first slots before the map shows it.
        recently = asyncio.get_running_loop().time() - _POINTED_AT_S
        self._pointed_at = {server: since for server, since in self._pointed_at.items() if since > recently}
        for server in set(self._links) - set(lowest) - set(self._pointed_at):
            link = self._links.pop(server)
            if link.channel is not None:
                # Not drained: a deposed server loses what it stores, so its replies are doubt.
                link.channel.connection_lost(ConnectionError(f"{server} is not a master of the cluster any more"))
            closing = asyncio.get_running_loop().create_task(link.close())
            self._closings.add(closing)
            closing.add_done_callback(self._closings.discard)

    def _link_to(self, server: RedisTarget) -> RedisLink:
        link = self._links.get(server)
        if link is None:
            link = RedisLink(FixedServer(server), self._timeout_ms, self._min_replicas, self._observer)
            self._links[server] = link
            link.start()
        return link


async def cluster_map(node: RedisTarget, timeout_s: float) -> tuple[dict[str, str], list[SlotRange]]:
    """Return a node's CLUSTER INFO and map of slots to masters, over a separate connection.

    Ends within `timeout_s` seconds. Raises redis-py's errors, ValueError for a malformed map, and StoreRefused for a
    server outside a cluster.
    """
    connection = new_connection(node, timeout_s)
    try:
        async with asyncio.timeout(timeout_s):
            await connection.connect()  # type: ignore[no-untyped-call]
            await connection.send_command("CLUSTER", "INFO")
            state = parse_info(await connection.read_response())
            await connection.send_command("CLUSTER", "SLOTS")
            return state, _slot_ranges(await connection.read_response(), node)
    except exceptions.ResponseError as error:
        if "cluster support disabled" in str(error):
            raise StoreRefused(
                f"Redis at {node} is not a node of a cluster: write {'rediss' if node.tls else 'redis'}:// for it"
            ) from error
        raise
    finally:
        await connection.disconnect(nowait=True)


def _slot_ranges(reply: Any, node: RedisTarget) -> list[SlotRange]:  # noqa: ANN401 - any reply of Redis
    try:
        ranges = []
        for first, last, (host, port, *_), *_ in reply:
            # A node that does not know its name has the one that reached it.
            name = host.decode() if host and host != b"?" else node.host
            if not 0 <= first <= last < REDIS_CLUSTER_HASH_SLOTS or not 0 < port < 65536:
                raise ValueError  # noqa: TRY301 - as any other malformed map
            ranges.append((first, last, replace(node, host=name, port=port)))
    except (TypeError, ValueError, AttributeError):
        raise ValueError("its reply is not a slot map") from None
    if not ranges:
        raise ValueError("it knows no slots: create the cluster first")
    return ranges


@cache
def hash_tag_of(slot: int) -> bytes:
    """Return the hash tag with the smallest number in a slot."""
    return next(tag for tag in (b"{%d}" % number for number in count()) if key_slot(tag) == slot)
