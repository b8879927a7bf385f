"""Keeps as many workers as were asked for, replaces them one by one, and ends after the last of them."""

import asyncio
import json
import signal
from collections.abc import Callable, Coroutine, Sequence
from itertools import count
from typing import Any, Protocol

from dedup_service.supervisor.messages import Refusal, WorkerOrders
from dedup_service.supervisor.worker_process import WorkerProcess, start_worker, status_text

# Before the second restart of a worker that keeps dying; each pause is twice the one before.
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 30.0
# A worker that lived this long was in order, and its death is the first one again.
_SETTLED_S = 60.0

# What a worker may take to end beyond its grace and the store's time-out, before it is killed.
_END_SLACK_S = 3.0


class SharedFigures(Protocol):
    """Where the workers leave their figures, as `telemetry.worker_metrics` has it."""

    folder: str

    def serving(self, workers: int) -> None:
        """Tell how many workers live."""

    def restarted(self) -> None:
        """Tell that a worker died and is started again."""

    def ended(self, number: int) -> None:
        """Forget what was true of a worker only while it lived."""


class RestartPauses:
    """How long to wait before a worker is started again: not at all at first, then longer each time, up to a limit."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def after(self, lived_s: float) -> float:
        """Return the seconds to wait after a worker that lived this long."""
        pause_s = 0.0 if lived_s >= _SETTLED_S else self._next_s
        self._next_s = min(max(_FIRST_PAUSE_S, 2 * pause_s), _LONGEST_PAUSE_S)
        return pause_s


class _Place:
    """The place of one worker, which others take after it; whoever changes that holds the lock."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker = worker
        self.lock = asyncio.Lock()


class Supervisor:
    """Runs workers with these settings: a dict as `Settings.to_json` wrote it, with the addresses that are reserved."""

    def __init__(self, settings: dict[str, Any], figures: SharedFigures | None, log: Any) -> None:  # noqa: ANN401 - as in logs.logger
        self._count: int = settings["workers"]
        self._settings = json.dumps(settings)
        self._patience_s = (settings["shutdown_grace"] + settings["store_timeout"]) / 1000 + _END_SLACK_S
        self._figures = figures
        self._log = log
        self._numbers: set[int] = set()
        self._living: set[WorkerProcess] = set()
        self._places: list[_Place] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._burials: set[asyncio.Task[None]] = set()
        self._replacement_wanted = asyncio.Event()
        # Why it ends: a refusal, or None when it was asked to.
        self._over: asyncio.Future[Refusal | None] = asyncio.get_running_loop().create_future()

    async def run(self, announce: Callable[[Sequence[str]], None]) -> Refusal | None:
        """Supervise until SIGTERM or SIGINT, or until the workers cannot serve; return why they cannot.

        `announce` is called once with the addresses, when every worker serves. Workers get each SIGTERM, SIGINT and
        SIGHUP; at SIGUSR2 they are replaced one by one, each new one serving before the old one drains. A worker that
        dies is started again. Returns after the last of them has ended or was killed.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(signal.SIGUSR2, self._replacement_wanted.set)
        self._spawn_task(self._start(announce))
        try:
            return await self._over
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._end_workers()

    def _end(self, number: signal.Signals) -> None:
        for worker in self._living:
            worker.signal(number)
        if not self._over.done():
            self._over.set_result(None)

    def _reload(self) -> None:
        for worker in self._living:
            worker.reload()

    async def _start(self, announce: Callable[[Sequence[str]], None]) -> None:
        workers = [await self._start_worker() for _ in range(self._count)]
        for serving in asyncio.as_completed([self._serves_first(worker) for worker in workers]):
            if refusal := await serving:
                self._refuse(refusal)
                return
        self._places = [_Place(worker) for worker in workers]
        for place in self._places:
            self._spawn_task(self._keep(place))
        self._spawn_task(self._replace_when_asked())
        announce(workers[0].addresses)

    async def _serves_first(self, worker: WorkerProcess) -> Refusal | None:
        if await worker.serves():
            return None
        status = status_text(await worker.ended())
        return worker.refusal or Refusal(f"worker {worker.number} {status} before it served: the log may say why", 1)

    async def _start_worker(self) -> WorkerProcess:
        number = next(number for number in count(1) if number not in self._numbers)
        self._numbers.add(number)
        folder = self._figures.folder if self._figures else None
        try:
            worker = await start_worker(WorkerOrders(number, self._settings, folder))
        except BaseException:
            self._numbers.discard(number)
            raise
        self._living.add(worker)
        self._count_living()
        self._log.info("worker_spawned", worker=number, pid=worker.pid)
        self._burials.add(burial := asyncio.create_task(self._bury(worker)))
        burial.add_done_callback(self._burials.discard)
        return worker

    async def _bury(self, worker: WorkerProcess) -> None:
        await worker.ended()
        self._living.discard(worker)
        self._numbers.discard(worker.number)
        if self._figures:
            self._figures.ended(worker.number)
        self._count_living()

    def _count_living(self) -> None:
        if self._figures:
            self._figures.serving(len(self._living))

    async def _keep(self, place: _Place) -> None:
        """Start whoever takes the place again when it dies, for ever."""
        pauses = RestartPauses()
        while True:
            worker = place.worker
            status = await worker.ended()
            async with place.lock:
                if place.worker is not worker:
                    # It was replaced, and its end wanted.
                    continue
                if worker.refusal and worker.addresses:
                    # What it found out while it served is so for all of them.
                    self._refuse(worker.refusal)
                    return
                pause_s = pauses.after(worker.lived_s)
                why = {"refusal": worker.refusal.sentence} if worker.refusal else {}
                self._log.error(
                    "worker_died",
                    worker=worker.number,
                    pid=worker.pid,
                    status=status_text(status),
                    lived_s=round(worker.lived_s, 1),
                    restart_in_s=pause_s,
                    **why,
                )
                await asyncio.sleep(pause_s)
                if self._figures:
                    self._figures.restarted()
                place.worker = await self._start_worker()

    async def _replace_when_asked(self) -> None:
        while True:
            await self._replacement_wanted.wait()
            self._replacement_wanted.clear()
            self._log.info("worker_replacement_started", workers=self._count)
            for place in self._places:
                if not place.lock.locked() and not await self._replace(place):
                    break
            else:
                self._log.info("workers_replaced", workers=self._count)

    async def _replace(self, place: _Place) -> bool:
        """Put a new worker into the place, then end the old one; say whether that worked."""
        async with place.lock:
            old, new = place.worker, await self._start_worker()
            if not await new.serves():
                status = status_text(await new.ended())
                why = new.refusal.sentence if new.refusal else status
                self._log.error("worker_replacement_failed", worker=old.number, message=f"the old workers stay: {why}")
                return False
            place.worker = new
            old.signal(signal.SIGTERM)
            await self._ended_or_killed(old)
            return True

    def _refuse(self, refusal: Refusal) -> None:
        if not self._over.done():
            self._over.set_result(refusal)

    async def _end_workers(self) -> None:
        if not self._over.cancelled() and (self._over.exception() or self._over.result()):
            self._end(signal.SIGTERM)
        await asyncio.gather(*map(self._ended_or_killed, self._living))
        # Their figures are put in order before the folder of the figures goes.
        await asyncio.gather(*self._burials)

    async def _ended_or_killed(self, worker: WorkerProcess) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                await worker.ended()
        except TimeoutError:
            self._log.error("worker_killed", worker=worker.number, pid=worker.pid, after_s=self._patience_s)
            worker.signal(signal.SIGKILL)
            await worker.ended()

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_failure)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not self._over.done():
            self._over.set_exception(error)
