"""The stores: one module each behind `ClaimStore`, and the one place that chooses by URL. None knows a protocol."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dedup_service.claims import ClaimStore, ConnectionObserver, Finding, Severity
from dedup_service.config.settings import Settings
from dedup_service.stores.keys import KeyLayout, canary_prefix, prefixed_layout, raw_layout

if TYPE_CHECKING:
    from dedup_service.stores.redis.nodes import RedisNodes


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Where and how claims are kept: the store URL, and the settings that hold for any store.

    `min_replicas` is how many replicas have to acknowledge a claim before it is made.
    """

    url: str = field(repr=False)
    key_layout: str = "prefixed"
    key_prefix: str = "dedup:"
    timeout_ms: int = 1_000
    min_replicas: int = 0

    @property
    def layout(self) -> KeyLayout:
        """The key of a transaction."""
        return raw_layout if self.key_layout == "raw" else prefixed_layout(self.key_prefix)

    @property
    def scheme(self) -> str:
        """What the URL begins with."""
        return self.url.partition(":")[0]


def store_config(settings: Settings) -> StoreConfig:
    """Return the part of the settings that says where and how claims are stored."""
    return StoreConfig(
        settings.effective_store_url,
        settings.key_layout,
        settings.key_prefix,
        settings.store_timeout,
        settings.min_replicas,
    )


def make_store(place: StoreConfig, observer: ConnectionObserver | None = None) -> ClaimStore:
    """Return the store of this place, not yet opened; `observer` hears of the connections that it makes over a network.

    Raises ValueError, with a sentence that never repeats the URL, when the URL names no store that there is.
    """
    make = _MAKERS.get(place.scheme)
    if make is None:
        raise ValueError(f"the store URL must begin with one of {', '.join(f'{name}:' for name in _MAKERS)}")
    return make(place, observer)


async def examine_store(place: StoreConfig) -> list[Finding]:
    """Return what is found at the store of this place, over connections of its own that are closed again.

    Raises ValueError as `make_store` does, StoreUnavailable when the store cannot be reached, and StoreRefused when
    nobody there knows it.
    """
    examine = _EXAMINERS.get(place.scheme)
    if examine is None:
        make_store(place)
        return [Finding("store", Severity.INFO, "This version does not know how to examine a store of this kind.")]
    return await examine(place)


# Each driver is imported only by who uses it: redis-py alone costs more than the rest of the start.
def _redis(place: StoreConfig, observer: ConnectionObserver | None) -> ClaimStore:
    from dedup_service.stores.redis.url import parse_redis_url  # noqa: PLC0415

    target = parse_redis_url(place.url)
    from dedup_service.stores.redis.link import FixedServer, RedisLink  # noqa: PLC0415
    from dedup_service.stores.redis.nodes import OneServer  # noqa: PLC0415

    nodes = OneServer(RedisLink(FixedServer(target), place.timeout_ms, place.min_replicas, observer))
    return _store_of(nodes, place, f"Redis at {target}")


def _redis_by_sentinel(place: StoreConfig, observer: ConnectionObserver | None) -> ClaimStore:
    from dedup_service.stores.redis.url import parse_sentinel_url  # noqa: PLC0415

    target = parse_sentinel_url(place.url)
    from dedup_service.stores.redis.link import RedisLink  # noqa: PLC0415
    from dedup_service.stores.redis.nodes import OneServer  # noqa: PLC0415
    from dedup_service.stores.redis.sentinel import SentinelLocator  # noqa: PLC0415

    link = RedisLink(SentinelLocator(target, place.timeout_ms), place.timeout_ms, place.min_replicas, observer)
    return _store_of(OneServer(link), place, f"Redis master {target}")


def _redis_cluster(place: StoreConfig, observer: ConnectionObserver | None) -> ClaimStore:
    from dedup_service.stores.redis.url import parse_cluster_url  # noqa: PLC0415

    target = parse_cluster_url(place.url)
    from dedup_service.stores.redis.cluster import ClusterNodes  # noqa: PLC0415

    nodes = ClusterNodes(target, place.timeout_ms, place.min_replicas, observer)
    return _store_of(nodes, place, f"Redis cluster {target}")


def _store_of(nodes: "RedisNodes", place: StoreConfig, description: str) -> ClaimStore:
    from dedup_service.stores.redis.canary import RedisCanary  # noqa: PLC0415
    from dedup_service.stores.redis.store import RedisStore  # noqa: PLC0415

    canary = RedisCanary(canary_prefix(place.layout, place.key_prefix))
    return RedisStore(nodes, place.layout, description, canary=canary, min_replicas=place.min_replicas)


def _sqlite(place: StoreConfig, _: ConnectionObserver | None) -> ClaimStore:
    from dedup_service.stores.sqlite.store import SqliteStore  # noqa: PLC0415

    path = sqlite_path(place.url)
    if place.min_replicas:
        raise ValueError("the embedded store has no replicas: leave DEDUP_MIN_REPLICAS at 0, or name a Redis")
    return SqliteStore(path, place.layout, timeout_ms=place.timeout_ms)


async def _examine_redis(place: StoreConfig) -> list[Finding]:
    from dedup_service.stores.redis.url import parse_redis_url  # noqa: PLC0415

    target = parse_redis_url(place.url)
    from dedup_service.stores.redis.doctor import examine_redis  # noqa: PLC0415

    return await examine_redis(target, place.layout, place.timeout_ms, min_replicas=place.min_replicas)


async def _examine_redis_by_sentinel(place: StoreConfig) -> list[Finding]:
    from dedup_service.stores.redis.url import parse_sentinel_url  # noqa: PLC0415

    target = parse_sentinel_url(place.url)
    from dedup_service.stores.redis.doctor import examine_redis  # noqa: PLC0415
    from dedup_service.stores.redis.sentinel import SentinelLocator  # noqa: PLC0415

    master = await SentinelLocator(target, place.timeout_ms).locate()
    return await examine_redis(master, place.layout, place.timeout_ms, min_replicas=place.min_replicas)


async def _examine_redis_cluster(place: StoreConfig) -> list[Finding]:
    from dedup_service.stores.redis.url import parse_cluster_url  # noqa: PLC0415

    target = parse_cluster_url(place.url)
    from dedup_service.stores.redis.cluster_doctor import examine_cluster  # noqa: PLC0415

    return await examine_cluster(target, place.layout, place.timeout_ms, place.min_replicas)


async def _examine_sqlite(place: StoreConfig) -> list[Finding]:
    from dedup_service.stores.sqlite.doctor import examine_sqlite  # noqa: PLC0415

    return examine_sqlite(sqlite_path(place.url))


def sqlite_path(url: str) -> Path:
    """Return the file that `sqlite:///absolute/path` or `sqlite:relative/path` names; raise ValueError for others."""
    rest = url.removeprefix("sqlite:")
    if rest.startswith("//"):
        if not rest.startswith("///"):
            raise ValueError("a sqlite: store URL names no host: write sqlite:///var/lib/dedup/claims.db")
        rest = rest[2:]
    if not rest.strip("/") or rest.endswith("/") or any(mark in rest for mark in "?#"):
        raise ValueError("a sqlite: store URL names a file and nothing else: write sqlite:///var/lib/dedup/claims.db")
    return Path(rest).expanduser()


_MAKERS: dict[str, Callable[[StoreConfig, ConnectionObserver | None], ClaimStore]] = {
    "redis": _redis,
    "rediss": _redis,
    "unix": _redis,
    "redis+sentinel": _redis_by_sentinel,
    "rediss+sentinel": _redis_by_sentinel,
    "redis+cluster": _redis_cluster,
    "rediss+cluster": _redis_cluster,
    "sqlite": _sqlite,
}

_EXAMINERS: dict[str, Callable[[StoreConfig], Awaitable[list[Finding]]]] = {
    "redis": _examine_redis,
    "rediss": _examine_redis,
    "unix": _examine_redis,
    "redis+sentinel": _examine_redis_by_sentinel,
    "rediss+sentinel": _examine_redis_by_sentinel,
    "redis+cluster": _examine_redis_cluster,
    "rediss+cluster": _examine_redis_cluster,
    "sqlite": _examine_sqlite,
}
