"""Where the server listens: TCP addresses and Unix sockets, and what can be wrong with them at the start."""

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Owner and group may connect: read and write, for a socket, are what connecting takes.
_SOCKET_UMASK = 0o117


class StartRefused(Exception):
    """The server cannot start; the message is one sentence that says what to change."""


# Binds a target of gRPC and returns its port, or raises RuntimeError.
AddPort = Callable[[str], int]


def add_listener(add_port: AddPort, address: str, *, reuse_port: bool = False) -> str:
    """Bind one address and return it as it turned out (port 0 becomes the port that was free).

    A Unix socket is created with mode 0660. Raises StartRefused when the address cannot be had, also when another
    server listens there already; with `reuse_port`, one that shares its TCP port does not count.
    """
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix://"))
        _make_way(path)
        with _umask(_SOCKET_UMASK):
            _bind(add_port, f"unix:{path}", address)
        return address
    host, _, port = address.rpartition(":")
    _probe(host.strip("[]"), int(port), address, reuse_port=reuse_port)
    return f"{host}:{_bind(add_port, address, address)}"


def _bind(add_port: AddPort, target: str, address: str) -> int:
    try:
        return add_port(target)
    except RuntimeError:
        raise StartRefused(f"cannot listen on {address}: the log of gRPC above may say why") from None


def _probe(host: str, port: int, address: str, *, reuse_port: bool) -> None:
    # gRPC knows why it cannot bind, and tells only its own log.
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse_port))
            probe.bind(where)
            if not reuse_port:
                # Beside others it would take connections away from them.
                probe.listen()
    except OSError as error:
        hint = ": does another server listen there?" if error.errno == errno.EADDRINUSE else ""
        raise StartRefused(f"cannot listen on {address}: {error.strerror}{hint}") from None


def _make_way(path: Path) -> None:
    # gRPC removes whatever socket is in its place, also one that a living server listens on.
    if not path.parent.is_dir():
        raise StartRefused(f"cannot listen on unix://{path}: the folder {path.parent} does not exist")
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise StartRefused(f"cannot listen on unix://{path}: a file that is no socket is in its place")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise StartRefused(f"cannot listen on unix://{path}: {error}") from None
    raise StartRefused(f"cannot listen on unix://{path}: another server listens there")


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)
