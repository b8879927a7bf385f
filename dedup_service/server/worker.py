"""The process of one worker among several: serves as the service alone would, and tells its supervisor how it goes."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

import uvloop

from dedup_service.server.app import serve
from dedup_service.server.listeners import StartRefused
from dedup_service.config.settings import BadSettings, settings_from_json
from dedup_service.observability.logs import configure_logs
from dedup_service.supervisor.messages import Refusal, WorkerOrders, refusal_line, serving_line

# What the drain may take beyond its grace once nobody supervises it.
_ORPHAN_SLACK_S = 5.0


def main() -> None:
    """Serve until SIGTERM, or until the supervisor is gone; the orders are the one line of the standard input."""
    orders = WorkerOrders.from_line(sys.stdin.buffer.readline())
    # What a library might print must not reach the supervisor as our word.
    report = os.dup(1)
    os.dup2(2, 1)
    settings = settings_from_json(orders.settings)
    configure_logs(settings.log_level, worker=orders.number)
    threading.Thread(target=_end_with_supervisor, args=(settings.shutdown_grace / 1000,), daemon=True).start()

    def announce(addresses: Sequence[str]) -> None:
        os.write(report, serving_line(list(addresses)))

    def refuse(refusal: Refusal) -> NoReturn:
        os.write(report, refusal_line(refusal))
        sys.exit(refusal.exit_code)

    try:
        uvloop.run(serve(settings, announce, orders))
    except StartRefused as refusal:
        refuse(Refusal(str(refusal), 1))
    except BadSettings as error:
        refuse(Refusal(str(error), 2))


def _end_with_supervisor(grace_s: float) -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s + _ORPHAN_SLACK_S)
    os._exit(1)


if __name__ == "__main__":
    main()
