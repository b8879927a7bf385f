"""The processes of the server: one that serves alone, and one of several workers."""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

import uvloop

from dedup_service.config.errors import BackgroundTaskFailed, FatalError
from dedup_service.config.settings import Settings, settings_from_json
from dedup_service.observability.banner import banner
from dedup_service.observability.logs import configure_logs
from dedup_service.observability.observers import WorkerMetricFiles
from dedup_service.server.life_cycle import Announce, serve
from dedup_service.signals import ignore_signals
from dedup_service.supervisor.messages import Refusal, WorkerStart, ready_line, refusal_line

# Time beyond the grace period in which a worker whose supervisor is gone has to end.
_ORPHAN_SLACK_S = 5.0


def run_server(settings: Settings, *, show_banner: bool = False) -> None:
    """Serve until a signal. Raises FatalError."""

    def announce(addresses: Sequence[str]) -> None:
        if show_banner:
            sys.stdout.write(banner(addresses))
            sys.stdout.flush()

    uvloop.run(_serve(settings, announce))


async def _serve(settings: Settings, announce: Announce, worker: WorkerMetricFiles | None = None) -> None:
    try:
        if not await serve(settings, announce, worker):
            # gRPC would cancel the calls it has not handed over. Without it, their connections end: UNAVAILABLE.
            sys.stdout.flush()
            os._exit(0)
    finally:
        ignore_signals()


def run_worker() -> None:
    """Serve as one of several workers until SIGTERM, or until the supervisor is gone.

    The first line of standard input says how to start; standard output reports to the supervisor.
    """
    line = sys.stdin.buffer.readline()
    if not line:
        # The supervisor is gone already.
        return
    start = WorkerStart.from_line(line)
    # Whatever a library prints must not reach the supervisor as a report.
    report = os.dup(1)
    os.dup2(2, 1)
    settings = settings_from_json(start.settings)
    configure_logs(settings.log_level, worker=start.number)
    threading.Thread(target=_stop_with_supervisor, args=(settings.shutdown_grace / 1000,), daemon=True).start()

    def announce(addresses: Sequence[str]) -> None:
        os.write(report, ready_line(list(addresses)))

    def refuse(error: FatalError) -> NoReturn:
        os.write(report, refusal_line(Refusal(str(error), error.exit_code)))
        sys.exit(error.exit_code)

    try:
        uvloop.run(_serve(settings, announce, WorkerMetricFiles(start.number, start.metrics_folder)))
    except BackgroundTaskFailed as error:
        # Not a refusal, which would stop every worker: the supervisor restarts this one.
        sys.exit(error.exit_code)
    except FatalError as error:
        refuse(error)


def _stop_with_supervisor(grace_s: float) -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s + _ORPHAN_SLACK_S)
    os._exit(1)
