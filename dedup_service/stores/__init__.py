"""The stores: one module each behind `ClaimStore`, and the one place that chooses by URL. None knows a protocol."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from dedup_service.claims import ClaimStore
from dedup_service.claims.findings import Finding, Severity
from dedup_service.stores.keys import KeyLayout, prefixed_layout, raw_layout


def make_store(url: str, *, key_layout: str, key_prefix: str, timeout_ms: int) -> ClaimStore:
    """Return the store that `url` names, not yet opened.

    Raises ValueError, with a sentence that never repeats the URL, when the URL names no store that there is.
    """
    layout = _layout(key_layout, key_prefix)
    scheme = url.partition(":")[0]
    make = _MAKERS.get(scheme)
    if make is None:
        raise ValueError(f"the store URL must begin with one of {', '.join(f'{name}:' for name in _MAKERS)}")
    return make(url, layout, timeout_ms)


async def examine_store(url: str, *, key_layout: str, key_prefix: str, timeout_ms: int) -> list[Finding]:
    """Return what is found at the store that `url` names, over a connection of its own that is closed again.

    Raises ValueError as `make_store` does, StoreUnavailable when the store cannot be reached, and StoreRefused when
    nobody there knows it.
    """
    examine = _EXAMINERS.get(url.partition(":")[0])
    if examine is None:
        make_store(url, key_layout=key_layout, key_prefix=key_prefix, timeout_ms=timeout_ms)
        return [Finding("store", Severity.INFO, "This version does not know how to examine a store of this kind.")]
    return await examine(url, _layout(key_layout, key_prefix), timeout_ms)


def _layout(key_layout: str, key_prefix: str) -> KeyLayout:
    return raw_layout if key_layout == "raw" else prefixed_layout(key_prefix)


# Each driver is imported only by who uses it: redis-py alone costs more than the rest of the start.
def _redis(url: str, layout: KeyLayout, timeout_ms: int) -> ClaimStore:
    from dedup_service.stores.redis_url import parse_redis_url  # noqa: PLC0415

    target = parse_redis_url(url)
    from dedup_service.stores.redis_link import FixedServer, RedisLink  # noqa: PLC0415
    from dedup_service.stores.redis_store import RedisStore  # noqa: PLC0415

    return RedisStore(RedisLink(FixedServer(target), timeout_ms), layout, f"Redis at {target}")


def _redis_by_sentinel(url: str, layout: KeyLayout, timeout_ms: int) -> ClaimStore:
    from dedup_service.stores.redis_url import parse_sentinel_url  # noqa: PLC0415

    target = parse_sentinel_url(url)
    from dedup_service.stores.redis_link import RedisLink  # noqa: PLC0415
    from dedup_service.stores.redis_sentinel import SentinelLocator  # noqa: PLC0415
    from dedup_service.stores.redis_store import RedisStore  # noqa: PLC0415

    return RedisStore(RedisLink(SentinelLocator(target, timeout_ms), timeout_ms), layout, f"Redis master {target}")


def _sqlite(url: str, layout: KeyLayout, timeout_ms: int) -> ClaimStore:
    from dedup_service.stores.sqlite_store import SqliteStore  # noqa: PLC0415

    return SqliteStore(sqlite_path(url), layout, timeout_ms=timeout_ms)


async def _examine_redis(url: str, layout: KeyLayout, timeout_ms: int) -> list[Finding]:
    from dedup_service.stores.redis_url import parse_redis_url  # noqa: PLC0415

    target = parse_redis_url(url)
    from dedup_service.stores.redis_doctor import examine_redis  # noqa: PLC0415

    return await examine_redis(target, layout, timeout_ms)


async def _examine_redis_by_sentinel(url: str, layout: KeyLayout, timeout_ms: int) -> list[Finding]:
    from dedup_service.stores.redis_url import parse_sentinel_url  # noqa: PLC0415

    target = parse_sentinel_url(url)
    from dedup_service.stores.redis_doctor import examine_redis  # noqa: PLC0415
    from dedup_service.stores.redis_sentinel import SentinelLocator  # noqa: PLC0415

    return await examine_redis(await SentinelLocator(target, timeout_ms).locate(), layout, timeout_ms)


async def _examine_sqlite(url: str, _layout: KeyLayout, _timeout_ms: int) -> list[Finding]:
    from dedup_service.stores.sqlite_doctor import examine_sqlite  # noqa: PLC0415

    return examine_sqlite(sqlite_path(url))


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


_MAKERS: dict[str, Callable[[str, KeyLayout, int], ClaimStore]] = {
    "redis": _redis,
    "rediss": _redis,
    "unix": _redis,
    "redis+sentinel": _redis_by_sentinel,
    "rediss+sentinel": _redis_by_sentinel,
    "sqlite": _sqlite,
}

_EXAMINERS: dict[str, Callable[[str, KeyLayout, int], Awaitable[list[Finding]]]] = {
    "redis": _examine_redis,
    "rediss": _examine_redis,
    "unix": _examine_redis,
    "redis+sentinel": _examine_redis_by_sentinel,
    "rediss+sentinel": _examine_redis_by_sentinel,
    "sqlite": _examine_sqlite,
}
