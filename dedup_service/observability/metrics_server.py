"""The HTTP endpoint that Prometheus asks, on a port of its own and in a thread of its own."""

from prometheus_client import CollectorRegistry, start_http_server


class MetricsPortTaken(Exception):
    """The address cannot be had; the message is one sentence that names the setting."""


class MetricsServer:
    """Shows what is in a registry to whoever asks, under any path. Raises MetricsPortTaken.

    `address` is the one that was asked for, with the port that was free in the place of port 0.
    """

    def __init__(self, address: str, registry: CollectorRegistry) -> None:
        host, _, port = address.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except OSError as error:
            raise MetricsPortTaken(
                f"DEDUP_METRICS_LISTEN (--metrics-listen): cannot listen on {address}: {error.strerror}; "
                "name an address of this host whose port is free"
            ) from None
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        """Answer no more; takes half a second at most."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
