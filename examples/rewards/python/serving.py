"""Serves a WSGI application with threads. In production use a server such as gunicorn."""

import signal
import threading
from typing import Any

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler


class Server(ThreadedWSGIServer):
    """Waits for the threads of its requests when it is closed."""

    daemon_threads = False


class QuietHandler(WSGIRequestHandler):
    """Logs errors only."""

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Log nothing for a handled request."""


def serve(app: Any, port: int) -> None:
    """Serve until SIGTERM, and then finish the requests in progress."""
    server = Server("127.0.0.1", port, app, handler=QuietHandler)
    # In a thread, since `shutdown` waits for the loop that the signal has interrupted.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"listening on 127.0.0.1:{server.port}", flush=True)
    server.serve_forever()
