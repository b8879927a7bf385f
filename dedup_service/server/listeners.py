"""Binding TCP addresses and Unix sockets through gRPC, and the warnings about exposed ones and readable secrets."""

import os
import secrets
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dedup_service.config.addresses import Address, reachable_from_other_hosts
from dedup_service.config.errors import AddressUnavailable
from dedup_service.config.settings import Settings
from dedup_service.observability.logs import Logger

# Owner and group may connect, which takes read and write permission.
_SOCKET_UMASK = 0o117

# Binds a target of gRPC and returns its port, or raises RuntimeError.
AddPort = Callable[[str], int]

# The Unix sockets of this process, each with its device and inode.
_sockets: dict[Path, tuple[int, int]] = {}


def add_listener(add_port: AddPort, address: str, *, reuse_port: bool = False) -> str:
    """Bind one address and return it; port 0 has become a free port.

    A Unix socket gets mode 0660. Raises AddressUnavailable, also when another server listens there; with `reuse_port`,
    servers that share the TCP port do not count.
    """
    parsed = Address.parse(address)
    if parsed.socket_path:
        _add_socket(add_port, Path(parsed.socket_path), address)
        return address
    parsed.probe(reuse_port=reuse_port)
    return str(parsed.with_port(_bind(add_port, address, address)))


def remove_sockets() -> None:
    """Remove the Unix sockets of this process, except where another file has their place.

    Called while they still listen: a server that starts meanwhile takes no path over that has a live listener.
    """
    while _sockets:
        path, own = _sockets.popitem()
        with suppress(OSError):
            if _identity(path) == own:
                path.unlink()


def _add_socket(add_port: AddPort, path: Path, address: str) -> None:
    _remove_stale_socket(path)
    # The engines remove any file at the path they bound when they stop, even the socket of another server. So they bind
    # a name that nobody else uses, and the socket is renamed.
    bound = path.with_name(f".{secrets.token_hex(3)}")
    with _umask(_SOCKET_UMASK):
        _bind(add_port, f"unix:{bound}", address)
    try:
        _sockets[path] = _identity(bound)
        bound.rename(path)
    except OSError as error:
        raise AddressUnavailable(f"cannot listen on {address}: {error.strerror}") from None


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _bind(add_port: AddPort, target: str, address: str) -> int:
    try:
        return add_port(target)
    except RuntimeError:
        raise AddressUnavailable(f"cannot listen on {address}: gRPC may have logged the cause above") from None


def _remove_stale_socket(path: Path) -> None:
    # gRPC would remove any socket in its place, also one a live server listens on.
    if not path.parent.is_dir():
        raise AddressUnavailable(f"cannot listen on unix://{path}: the folder {path.parent} does not exist")
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise AddressUnavailable(f"cannot listen on unix://{path}: a file that is not a socket is in its place")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise AddressUnavailable(f"cannot listen on unix://{path}: {error}") from None
    raise AddressUnavailable(f"cannot listen on unix://{path}: another server listens there")


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)


def warn_of_exposure(settings: Settings, addresses: Sequence[str], log: Logger) -> None:
    """Log a warning for each."""
    exposed = reachable_from_other_hosts(addresses)
    if exposed and not settings.authenticates:
        log.warning(
            "unauthenticated_listener_opened",
            addresses=exposed,
            message="every host that reaches these addresses may claim and release",
        )
    if exposed and settings.auth_tokens is not None and settings.tls_cert is None:
        log.warning(
            "tokens_sent_in_plaintext",
            addresses=exposed,
            message="without TLS here or in a proxy, the network can read the tokens: set DEDUP_TLS_CERT and "
            "DEDUP_TLS_KEY",
        )
    if exposed and settings.engine == "native":
        log.warning(
            "unbounded_decompression_exposed",
            addresses=exposed,
            message="the engine 'native' unpacks compressed requests of any size before it authenticates their peer: "
            "admit only trusted peers, or set DEDUP_ENGINE=grpcio",
        )
    for path in (settings.tls_key, settings.auth_tokens, settings.store_url_file):
        if path is not None and _readable_by_everybody(path):
            log.warning(
                "secret_file_exposed",
                file=str(path),
                message="every user of this host can read this file: chmod o-r it",
            )


def _readable_by_everybody(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False
