"""The TCP ports of the service, held by the supervisor as long as it lives."""

import socket
from collections.abc import Sequence

from dedup_service.config.addresses import Address


class HeldPorts:
    """Holds the addresses of the workers, so that no other process gets them while a worker is away.

    `addresses` are the bound ones; port 0 has become a free port. Raises AddressUnavailable.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._sockets: list[socket.socket] = []
        try:
            self.addresses = [str(self._hold(Address.parse(address))) for address in addresses]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the ports."""
        for held in self._sockets:
            held.close()

    def _hold(self, address: Address) -> Address:
        # Without SO_REUSEPORT, which would silently share the port of another service.
        address.probe()
        try:
            family, kind, protocol, where = address.resolve()
            held = socket.socket(family, kind, protocol)
            self._sockets.append(held)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # SO_REUSEADDR passes the connections an earlier service left in TIME_WAIT. It is then unset, since it would
            # also let the probe of another service pass this socket.
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(where)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError as error:
            raise address.unavailable(error) from None
        return address.with_port(held.getsockname()[1])
