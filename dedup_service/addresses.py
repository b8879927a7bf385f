"""Addresses as operators write them: what is one, and who can reach it."""

import ipaddress
import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import BeforeValidator

_TCP_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):(\d{1,5})")
_MAX_PORT = 65_535
# sun_path of a Unix socket address holds 108 bytes with its closing zero on Linux, 104 elsewhere.
_MAX_SOCKET_PATH = 103


def _addresses(value: object) -> object:
    if not isinstance(value, str):
        return value
    addresses = tuple(part.strip() for part in value.split(",") if part.strip())
    if not addresses:
        raise ValueError("names no address: write host:port or unix:///path, several with commas between")
    for address in addresses:
        _check_address(address)
    return addresses


def _check_address(address: str) -> None:
    if address.startswith("unix:"):
        path = address.removeprefix("unix://")
        if not path.startswith("/") or len(path.encode()) > _MAX_SOCKET_PATH:
            raise ValueError(
                f"{address!r} is no Unix socket: write unix:///path, at most {_MAX_SOCKET_PATH} bytes of path"
            )
        return
    match = _TCP_ADDRESS.fullmatch(address)
    if match is None or int(match[2]) > _MAX_PORT:
        raise ValueError(f"{address!r} is no address: write host:port (such as 127.0.0.1:50051) or unix:///path")


def _metrics_address(value: object) -> object:
    match = _TCP_ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if value is not None and (match is None or int(match[2]) > _MAX_PORT):
        raise ValueError(f"{value!r} is no address: write host:port, such as 127.0.0.1:9090")
    return value


Addresses = Annotated[tuple[str, ...], BeforeValidator(_addresses)]
MetricsAddress = Annotated[str | None, BeforeValidator(_metrics_address)]


def beyond_this_host(addresses: Iterable[str]) -> list[str]:
    """Return those of the addresses that other hosts may reach: all but Unix sockets and the loopback."""
    return [address for address in addresses if not address.startswith("unix:") and not _is_loopback(address)]


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # Any other name may mean any address tomorrow.
        return host == "localhost"
