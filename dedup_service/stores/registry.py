"""Chooses the store by its URL's scheme: one row of `_STORES` each.

A row imports its driver only to make or examine a store: redis-py costs more than the rest of the start-up.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dedup_service.claims import ClaimStore, ConnectionObserver, Finding
from dedup_service.config.settings import Settings
from dedup_service.stores.redis.url import (
    ClusterTarget,
    RedisTarget,
    SentinelTarget,
    parse_cluster_url,
    parse_redis_url,
    parse_sentinel_url,
)
from dedup_service.stores.sqlite.url import parse_sqlite_url
from dedup_service.stores.stored_value import KeyLayout, canary_prefix, prefixed_layout, raw_layout

if TYPE_CHECKING:
    from dedup_service.stores.redis.link import RedisNodes

TraceAttributes = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where and how claims are stored. CLAIMED needs the acknowledgement of `min_replicas` replicas."""

    url: str = field(repr=False)
    key_layout: str = "prefixed"
    key_prefix: str = "dedup:"
    timeout_ms: int = 1_000
    min_replicas: int = 0

    @property
    def layout(self) -> KeyLayout:
        """The function that makes a transaction's key."""
        return raw_layout if self.key_layout == "raw" else prefixed_layout(self.key_prefix)

    @property
    def scheme(self) -> str:
        """The URL before its first colon."""
        return self.url.partition(":")[0]


def store_config(settings: Settings) -> StoreConfig:
    """Return the settings of the store."""
    return StoreConfig(
        settings.effective_store_url,
        settings.key_layout,
        settings.key_prefix,
        settings.store_timeout,
        settings.min_replicas,
    )


def make_store(config: StoreConfig, connections: ConnectionObserver | None = None) -> ClaimStore:
    """Return the unopened store; `connections` is notified of its network connections.

    Raises ValueError for an invalid URL, with a sentence that never repeats it.
    """
    store = _store_of(config)
    return store.make(config, store.parse(config.url), connections)


async def examine_store(config: StoreConfig) -> list[Finding]:
    """Return the findings on the store, over separate connections that are closed again.

    Raises ValueError as `make_store` does, StoreUnavailable for an unreachable store, and StoreRefused when no Sentinel
    or cluster knows it.
    """
    store = _store_of(config)
    return await store.examine(config, store.parse(config.url))


def trace_attributes(config: StoreConfig) -> tuple[TraceAttributes, Mapping[str, TraceAttributes]]:
    """Return the trace attributes of every store span and of each operation, by OpenTelemetry's conventions.

    Raises ValueError as `make_store` does.
    """
    store = _store_of(config)
    return store.trace(store.parse(config.url)), store.commands


TargetT = TypeVar("TargetT")


@dataclass(frozen=True, slots=True)
class _Store(Generic[TargetT]):
    """A kind of store: how to parse its URL, make and examine it, and describe it in traces."""

    parse: Callable[[str], TargetT]
    make: Callable[[StoreConfig, TargetT, ConnectionObserver | None], ClaimStore]
    examine: Callable[[StoreConfig, TargetT], Awaitable[list[Finding]]]
    trace: Callable[[TargetT], TraceAttributes]
    commands: Mapping[str, TraceAttributes]


def _store_of(config: StoreConfig) -> _Store[Any]:
    store = _STORES.get(config.scheme)
    if store is None:
        raise ValueError(f"the store URL must begin with one of {', '.join(f'{name}:' for name in _STORES)}")
    return store


def _make_redis(config: StoreConfig, target: RedisTarget, connections: ConnectionObserver | None) -> ClaimStore:
    from dedup_service.stores.redis.link import FixedServer, OneServer, RedisLink  # noqa: PLC0415

    link = RedisLink(FixedServer(target), config.timeout_ms, config.min_replicas, connections)
    return _redis_store(config, OneServer(link), f"Redis at {target}")


def _make_sentinel(config: StoreConfig, target: SentinelTarget, connections: ConnectionObserver | None) -> ClaimStore:
    from dedup_service.stores.redis.link import OneServer, RedisLink  # noqa: PLC0415
    from dedup_service.stores.redis.sentinel import SentinelLocator  # noqa: PLC0415

    locator = SentinelLocator(target, config.timeout_ms)
    link = RedisLink(locator, config.timeout_ms, config.min_replicas, connections)
    return _redis_store(config, OneServer(link), f"Redis master {target}")


def _make_cluster(config: StoreConfig, target: ClusterTarget, connections: ConnectionObserver | None) -> ClaimStore:
    from dedup_service.stores.redis.cluster import ClusterNodes  # noqa: PLC0415

    nodes = ClusterNodes(target, config.timeout_ms, config.min_replicas, connections)
    return _redis_store(config, nodes, f"Redis cluster {target}")


def _redis_store(config: StoreConfig, nodes: "RedisNodes", description: str) -> ClaimStore:
    from dedup_service.stores.redis.canary import RedisCanary  # noqa: PLC0415
    from dedup_service.stores.redis.store import RedisStore  # noqa: PLC0415

    canary = RedisCanary(canary_prefix(config.layout, config.key_prefix))
    return RedisStore(nodes, config.layout, description, canary=canary, min_replicas=config.min_replicas)


def _make_sqlite(config: StoreConfig, path: Path, _: ConnectionObserver | None) -> ClaimStore:
    from dedup_service.stores.sqlite.store import SqliteStore  # noqa: PLC0415

    if config.min_replicas:
        raise ValueError("the embedded store has no replicas: leave DEDUP_MIN_REPLICAS at 0, or name a Redis")
    return SqliteStore(path, config.layout, timeout_ms=config.timeout_ms)


async def _examine_redis(config: StoreConfig, target: RedisTarget) -> list[Finding]:
    from dedup_service.stores.redis.doctor import examine_redis  # noqa: PLC0415

    return await examine_redis(target, config.layout, config.timeout_ms, min_replicas=config.min_replicas)


async def _examine_sentinel(config: StoreConfig, target: SentinelTarget) -> list[Finding]:
    from dedup_service.stores.redis.sentinel import SentinelLocator  # noqa: PLC0415

    return await _examine_redis(config, await SentinelLocator(target, config.timeout_ms).locate())


async def _examine_cluster(config: StoreConfig, target: ClusterTarget) -> list[Finding]:
    from dedup_service.stores.redis.doctor import examine_cluster  # noqa: PLC0415

    return await examine_cluster(target, config.layout, config.timeout_ms, config.min_replicas)


async def _examine_sqlite(_: StoreConfig, path: Path) -> list[Finding]:
    from dedup_service.stores.sqlite.doctor import examine_sqlite  # noqa: PLC0415

    return examine_sqlite(path)


def _trace_redis(target: RedisTarget) -> TraceAttributes:
    attributes: dict[str, str | int] = {
        "db.system.name": "redis",
        "db.namespace": str(target.db),
        "server.address": target.socket_path or target.host,
    }
    if not target.socket_path:
        attributes["server.port"] = target.port
    return attributes


def _trace_one_of_several(_: SentinelTarget | ClusterTarget) -> TraceAttributes:
    # The server that will answer is unknown.
    return {"db.system.name": "redis"}


def _trace_sqlite(_: Path) -> TraceAttributes:
    return {"db.system.name": "sqlite"}


# A script's name stands for its constant text.
_REDIS_COMMANDS: Mapping[str, TraceAttributes] = {
    "claim": {"db.operation.name": "SET"},
    "claim_all": {"db.operation.name": "SET"},
    "get": {"db.operation.name": "GET"},
} | {
    name: {"db.operation.name": "EVALSHA", "db.stored_procedure.name": name}
    for name in ("complete", "release", "extend")
}

_ONE_REDIS = _Store(parse_redis_url, _make_redis, _examine_redis, _trace_redis, _REDIS_COMMANDS)
_SENTINEL = _Store(parse_sentinel_url, _make_sentinel, _examine_sentinel, _trace_one_of_several, _REDIS_COMMANDS)
_CLUSTER = _Store(parse_cluster_url, _make_cluster, _examine_cluster, _trace_one_of_several, _REDIS_COMMANDS)
_SQLITE = _Store(parse_sqlite_url, _make_sqlite, _examine_sqlite, _trace_sqlite, {})

_STORES: dict[str, _Store[Any]] = {
    "redis": _ONE_REDIS,
    "rediss": _ONE_REDIS,
    "unix": _ONE_REDIS,
    "redis+sentinel": _SENTINEL,
    "rediss+sentinel": _SENTINEL,
    "redis+cluster": _CLUSTER,
    "rediss+cluster": _CLUSTER,
    "sqlite": _SQLITE,
}
