"""The TCP ports of the service, held by the supervisor for as long as it lives."""

import errno
import socket


class PortTaken(Exception):
    """A port cannot be had; the message is one sentence that says which, and why."""


class Reservation:
    """Holds the addresses that the workers listen on, so that nobody else gets them while a worker is away.

    `addresses` are those that were asked for, with the port that was free in the place of port 0. Raises PortTaken when
    another server listens on one, or holds it.
    """

    def __init__(self, addresses: list[str]) -> None:
        self._sockets: list[socket.socket] = []
        try:
            self.addresses = [self._hold(address) for address in addresses]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the ports."""
        for held in self._sockets:
            held.close()

    def _hold(self, address: str) -> str:
        host, _, port = address.rpartition(":")
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[
                0
            ]
            # Without SO_REUSEPORT, which would let us share the port of another service in silence.
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
                probe.listen()
            held = socket.socket(family, kind, protocol)
            self._sockets.append(held)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Past the connections that a service before us has left in TIME_WAIT, and then not any more, since the
            # option would also let the probe of another service past this socket.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(where)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError as error:
            hint = ": does another server listen there?" if error.errno == errno.EADDRINUSE else ""
            raise PortTaken(f"cannot listen on {address}: {error.strerror}{hint}") from None
        return f"{host}:{held.getsockname()[1]}"
