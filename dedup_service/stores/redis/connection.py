"""Makes and checks one connection to a Redis server with redis-py (TLS, AUTH, database).

redis-py's retries, notifications and client announcements are off. Knows no claims.
"""

import re
from collections.abc import Callable
from typing import Any

from redis import exceptions
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection

from dedup_service.claims import Applied, Reason, StoreRefused, StoreUnavailable
from dedup_service.stores.redis.url import RedisTarget

MINIMUM_REDIS = (7, 0)

_VERSION = re.compile(r"(\d+)\.(\d+)[.\d]*")


def new_connection(target: RedisTarget, timeout_s: float) -> AbstractConnection:
    """Return an unconnected connection. redis-py sends only AUTH and SELECT on it."""
    options: dict[str, Any] = {
        "db": target.db,
        "username": target.username or None,
        "password": target.password or None,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        # RESP2 needs no HELLO, which breaks old proxies, and has no push messages.
        "protocol": 2,
        "driver_info": None,
        "retry": None,
        "retry_on_timeout": False,
        "health_check_interval": 0,
    }
    make: Callable[..., AbstractConnection] = Connection
    if target.socket_path:
        make = UnixDomainSocketConnection
        options["path"] = target.socket_path
    else:
        options |= {"host": target.host, "port": target.port}
        if target.tls:
            make = SSLConnection
            options |= target.tls_files
    return make(**options)


async def shake_hands(connection: AbstractConnection, target: RedisTarget) -> str | None:
    """Connect to a master of a supported version; return its run_id, None where INFO is forbidden.

    Raises StoreUnavailable (never applied), and StoreRefused when the server can never serve claims.
    """
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        info = await _server_info(connection)
        _check_version(info, target)
        await _check_role(connection, target)
        if await connection.can_read():
            raise StoreUnavailable(
                Reason.STORE_PROTOCOL_ERROR, "Redis sent a reply to no command: check for a proxy", Applied.NO
            )
        return info.get("run_id")
    except exceptions.AuthenticationError as error:
        raise StoreUnavailable(
            Reason.STORE_NOT_AUTHENTICATED,
            f"Redis at {target} refused the user name or password of the store URL, correct it: {error}",
            Applied.NO,
        ) from error
    except exceptions.NoPermissionError as error:
        raise StoreUnavailable(
            Reason.STORE_NOT_PERMITTED,
            f"the Redis user of the store URL lacks a right, dedup-service doctor names it: {error}",
            Applied.NO,
        ) from error
    except (exceptions.RedisError, OSError) as error:
        raise StoreUnavailable(
            Reason.STORE_UNREACHABLE,
            f"Redis at {target} cannot be reached, check that it runs and the store URL: {error}",
            Applied.NO,
        ) from error


async def _server_info(connection: AbstractConnection) -> dict[str, str]:
    try:
        return parse_info(await _ask(connection, "INFO", "server"))
    except exceptions.ResponseError:
        # Without INFO, a server that is too old refuses the first claim.
        return {}


def _check_version(info: dict[str, str], target: RedisTarget) -> None:
    if info.get("redis_mode") == "sentinel":
        raise StoreRefused(
            f"{target} is a Redis Sentinel, which holds no data: name the Redis server itself, "
            "or write redis+sentinel:// and the name of its master"
        )
    version = _VERSION.match(info.get("redis_version", ""))
    if version is not None and (int(version[1]), int(version[2])) < MINIMUM_REDIS:
        raise StoreRefused(
            f"Redis at {target} has version {version[0]}, and a claim needs SET with NX and GET together: "
            "use Redis 7.0 or newer, or Valkey 7.2 or newer"
        )


async def _check_role(connection: AbstractConnection, target: RedisTarget) -> None:
    role: object
    try:
        reply = await _ask(connection, "ROLE")
        role = reply[0].decode(errors="replace") if isinstance(reply, list) and isinstance(reply[0], bytes) else None
    except exceptions.ResponseError:
        try:
            role = parse_info(await _ask(connection, "INFO", "replication")).get("role")
        except exceptions.ResponseError:
            role = None
    # If both are forbidden or unknown to a proxy, a replica refuses the first claim.
    if role not in {None, "master"}:
        raise StoreUnavailable(
            Reason.STORE_READ_ONLY,
            f"Redis at {target} is a read-only replica: name the primary, or wait for the failover to end",
            Applied.NO,
        )


async def _ask(connection: AbstractConnection, *command: str) -> Any:  # noqa: ANN401 - any reply of Redis
    await connection.send_command(*command)
    return await connection.read_response()


def parse_info(reply: bytes) -> dict[str, str]:
    """Return the fields of an INFO reply."""
    lines = (line.partition(":") for line in reply.decode(errors="replace").splitlines() if not line.startswith("#"))
    return {name: value for name, colon, value in lines if colon}
