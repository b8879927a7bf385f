"""Addresses to listen on: parsing, reachability, and a probe that explains a failed bind."""

import errno
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from dedup_service.config.errors import AddressUnavailable

_TCP = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):(\d{1,5})")
_MAX_PORT = 65_535
# sun_path holds 108 bytes with its closing zero on Linux, 104 elsewhere.
_MAX_SOCKET_PATH = 103

SocketAddress = tuple[socket.AddressFamily, socket.SocketKind, int, Any]


@dataclass(frozen=True, slots=True)
class Address:
    """`host:port`, or a Unix socket at `socket_path`."""

    host: str = ""
    port: int = 0
    socket_path: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `host:port`, `[IPv6]:port` or `unix:///path`. Raises ValueError with a readable sentence."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix://")
            if not path.startswith("/") or len(path.encode()) > _MAX_SOCKET_PATH:
                raise ValueError(
                    f"{text!r} is not a Unix socket: write unix:///path, at most {_MAX_SOCKET_PATH} bytes of path"
                )
            return cls(socket_path=path)
        return cls.parse_tcp(text, "write host:port (such as 127.0.0.1:50051) or unix:///path")

    @classmethod
    def parse_tcp(cls, text: str, remedy: str = "write host:port, such as 127.0.0.1:9090") -> Self:
        """Parse `host:port` or `[IPv6]:port`. Raises ValueError as `parse` does."""
        match = _TCP.fullmatch(text)
        if match is None or int(match[2]) > _MAX_PORT:
            raise ValueError(f"{text!r} is not an address: {remedy}")
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"unix://{self.socket_path}" if self.socket_path else f"{self.host}:{self.port}"

    @property
    def bare_host(self) -> str:
        """The host without IPv6 brackets."""
        return self.host.strip("[]")

    @property
    def is_local(self) -> bool:
        """Whether only this host can reach the address: a Unix socket or loopback."""
        if self.socket_path:
            return True
        try:
            return ipaddress.ip_address(self.bare_host).is_loopback
        except ValueError:
            # Other names may resolve differently tomorrow.
            return self.host == "localhost"

    def with_port(self, port: int) -> "Address":
        """Return the same host with this port."""
        return Address(self.host, port)

    def resolve(self) -> SocketAddress:
        """Return family, kind, protocol and socket address. Raises OSError."""
        found = socket.getaddrinfo(self.bare_host, self.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        return family, kind, protocol, where

    def probe(self, *, reuse_port: bool = False) -> None:
        """Bind the TCP address and release it; with `reuse_port`, other sockets may share it.

        Raises AddressUnavailable; gRPC only logs the cause.
        """
        try:
            family, kind, protocol, where = self.resolve()
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse_port))
                probe.bind(where)
                if not reuse_port:
                    # With a shared port, a listening probe would take connections from the others.
                    probe.listen()
        except OSError as error:
            raise self.unavailable(error) from None

    def unavailable(self, error: OSError) -> AddressUnavailable:
        """Return the exception for a socket error."""
        hint = ": does another server listen there?" if error.errno == errno.EADDRINUSE else ""
        return AddressUnavailable(f"cannot listen on {self}: {error.strerror}{hint}")


def parse_addresses(text: str) -> tuple[str, ...]:
    """Return the checked addresses of a comma-separated list. Raises ValueError."""
    addresses = tuple(part.strip() for part in text.split(",") if part.strip())
    if not addresses:
        raise ValueError("the list of addresses is empty: write host:port or unix:///path, separated by commas")
    for address in addresses:
        Address.parse(address)
    return addresses


def reachable_from_other_hosts(addresses: Iterable[str]) -> list[str]:
    """Return the addresses that are not local to this host."""
    return [address for address in addresses if not Address.parse(address).is_local]
