"""Keeps the configured number of workers alive, replaces them on request, and ends after the last one."""

import asyncio
import json
import signal
from collections.abc import Callable, Coroutine, Sequence
from itertools import count
from typing import Any, Protocol

from dedup_service.observability.logs import Logger
from dedup_service.supervisor.messages import Refusal, WorkerStart
from dedup_service.supervisor.worker_process import WorkerProcess, start_worker, status_text

# Backoff of a worker that keeps dying, from its second restart on; doubles each time.
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 30.0
# A worker that lived this long restarts with a fresh backoff.
_SETTLED_S = 60.0

# Added to the grace period and the store's timeout before a worker is killed.
_END_SLACK_S = 3.0


class Metrics(Protocol):
    """The workers' metrics, as in `observability.metrics_endpoint`."""

    folder: str

    def set_workers(self, count: int) -> None:
        """Set the number of live workers."""

    def count_restart(self) -> None:
        """Count a worker that replaces a dead one."""

    def drop_worker(self, number: int) -> None:
        """Remove values that ended with the worker."""


class RestartBackoff:
    """Pauses before a restart: none at first, then growing up to a limit."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def after(self, age_s: float) -> float:
        """Return the pause in seconds after a worker of this age died."""
        pause_s = 0.0 if age_s >= _SETTLED_S else self._next_s
        self._next_s = min(max(_FIRST_PAUSE_S, 2 * pause_s), _LONGEST_PAUSE_S)
        return pause_s


class _Slot:
    """One configured worker and its successors; changing it takes the lock."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker = worker
        self.lock = asyncio.Lock()


class Supervisor:
    """Runs workers with the dict of `Settings.to_json` and the held addresses."""

    def __init__(self, settings: dict[str, Any], metrics: Metrics | None, log: Logger) -> None:
        self._count: int = settings["workers"]
        self._settings = json.dumps(settings)
        self._end_timeout_s = (settings["shutdown_grace"] + settings["store_timeout"]) / 1000 + _END_SLACK_S
        self._metrics = metrics
        self._log = log
        self._numbers: set[int] = set()
        self._live: set[WorkerProcess] = set()
        self._slots: list[_Slot] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._cleanups: set[asyncio.Task[None]] = set()
        self._replacement_requested = asyncio.Event()
        # A refusal, or None after a signal.
        self._over: asyncio.Future[Refusal | None] = asyncio.get_running_loop().create_future()

    async def run(self, announce: Callable[[Sequence[str]], None]) -> Refusal | None:
        """Supervise until SIGTERM or SIGINT, or until the workers cannot serve; return the refusal.

        `announce` is called once with the addresses, when every worker is ready. Workers receive each SIGTERM, SIGINT
        and SIGHUP. SIGUSR2 replaces them one by one, each ready before the old one drains. Dead workers are restarted.
        Returns after the last worker has ended or was killed.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(signal.SIGUSR2, self._replacement_requested.set)
        self._start_task(self._start(announce))
        try:
            return await self._over
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._end_workers()

    def _end(self, number: signal.Signals) -> None:
        for worker in self._live:
            worker.signal(number)
        if not self._over.done():
            self._over.set_result(None)

    def _reload(self) -> None:
        for worker in self._live:
            worker.reload()

    async def _start(self, announce: Callable[[Sequence[str]], None]) -> None:
        workers = [await self._start_worker() for _ in range(self._count)]
        for ready in asyncio.as_completed([self._first_report(worker) for worker in workers]):
            if refusal := await ready:
                self._refuse(refusal)
                return
        self._slots = [_Slot(worker) for worker in workers]
        for slot in self._slots:
            self._start_task(self._keep(slot))
        self._start_task(self._replace_when_requested())
        announce(workers[0].addresses)

    async def _first_report(self, worker: WorkerProcess) -> Refusal | None:
        if await worker.ready():
            return None
        status = status_text(await worker.ended())
        return worker.refusal or Refusal(
            f"worker {worker.number} {status} before it was ready: the log may have the cause", 1
        )

    async def _start_worker(self) -> WorkerProcess:
        number = next(number for number in count(1) if number not in self._numbers)
        self._numbers.add(number)
        folder = self._metrics.folder if self._metrics else None
        try:
            worker = await start_worker(WorkerStart(number, self._settings, folder))
        except BaseException:
            self._numbers.discard(number)
            raise
        self._live.add(worker)
        self._count_live()
        self._log.info("worker_spawned", worker=number, pid=worker.pid)
        self._cleanups.add(cleanup := asyncio.create_task(self._clean_up_after(worker)))
        cleanup.add_done_callback(self._cleanups.discard)
        return worker

    async def _clean_up_after(self, worker: WorkerProcess) -> None:
        await worker.ended()
        self._live.discard(worker)
        self._numbers.discard(worker.number)
        if self._metrics:
            self._metrics.drop_worker(worker.number)
        self._count_live()

    def _count_live(self) -> None:
        if self._metrics:
            self._metrics.set_workers(len(self._live))

    async def _keep(self, slot: _Slot) -> None:
        """Restart the slot's worker whenever it dies."""
        backoff = RestartBackoff()
        while True:
            worker = slot.worker
            status = await worker.ended()
            async with slot.lock:
                if slot.worker is not worker:
                    # Replaced.
                    continue
                if worker.refusal and worker.addresses:
                    # A fault found while serving applies to every worker.
                    self._refuse(worker.refusal)
                    return
                pause_s = backoff.after(worker.age_s)
                why = {"refusal": worker.refusal.sentence} if worker.refusal else {}
                self._log.error(
                    "worker_died",
                    worker=worker.number,
                    pid=worker.pid,
                    status=status_text(status),
                    lived_s=round(worker.age_s, 1),
                    restart_in_s=pause_s,
                    **why,
                )
                await asyncio.sleep(pause_s)
                if self._metrics:
                    self._metrics.count_restart()
                slot.worker = await self._start_worker()

    async def _replace_when_requested(self) -> None:
        while True:
            await self._replacement_requested.wait()
            self._replacement_requested.clear()
            self._log.info("worker_replacement_started", workers=self._count)
            for slot in self._slots:
                if not slot.lock.locked() and not await self._replace(slot):
                    break
            else:
                self._log.info("workers_replaced", workers=self._count)

    async def _replace(self, slot: _Slot) -> bool:
        """Start a successor, then end the old worker; return success."""
        async with slot.lock:
            old, new = slot.worker, await self._start_worker()
            if not await new.ready():
                status = status_text(await new.ended())
                why = new.refusal.sentence if new.refusal else status
                self._log.error("worker_replacement_failed", worker=old.number, message=f"the old workers stay: {why}")
                return False
            slot.worker = new
            old.signal(signal.SIGTERM)
            await self._ended_or_killed(old)
            return True

    def _refuse(self, refusal: Refusal) -> None:
        if not self._over.done():
            self._over.set_result(refusal)

    async def _end_workers(self) -> None:
        if not self._over.cancelled() and (self._over.exception() or self._over.result()):
            self._end(signal.SIGTERM)
        await asyncio.gather(*map(self._ended_or_killed, self._live))
        # Before the folder of their metrics is removed.
        await asyncio.gather(*self._cleanups)

    async def _ended_or_killed(self, worker: WorkerProcess) -> None:
        try:
            async with asyncio.timeout(self._end_timeout_s):
                await worker.ended()
        except TimeoutError:
            self._log.error("worker_killed", worker=worker.number, pid=worker.pid, after_s=self._end_timeout_s)
            worker.signal(signal.SIGKILL)
            await worker.ended()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_failure)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self._over.done():
            self._over.set_exception(error)
