"""Puts the metrics around the rooms that know nothing of them: the claims and the store."""

import asyncio
import platform
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from dedup_service import __version__
from dedup_service.claims import (
    DEFAULT_NAMESPACE,
    ClaimAnswer,
    ClaimRequest,
    ClaimService,
    ClaimStore,
    Completion,
    Extension,
    Policies,
    Release,
    StoreNotice,
    Transaction,
)
from dedup_service.server.listeners import StartRefused
from dedup_service.api.admission import Admission
from dedup_service.api.servicer import METHODS, SERVICE_NAME
from dedup_service.config.settings import Settings
from dedup_service.observability.logs import logger
from dedup_service.supervisor.messages import WorkerOrders

if TYPE_CHECKING:
    # Who does not ask for metrics does not load their library.
    from dedup_service.observability.metrics import ClaimMetrics, Metrics, StoreMetrics

_SAMPLE_INTERVAL_S = 0.25

AnswerT = TypeVar("AnswerT")


@contextmanager
def measuring(settings: Settings, worker: WorkerOrders | None) -> Iterator["Metrics | None"]:
    """Yield the metrics of this process, or None where the settings want none.

    They are shown at the address of the settings meanwhile, unless this is one of several workers: then the supervisor
    shows them. Raises StartRefused when the address cannot be had.
    """
    if settings.metrics_listen is None:
        yield None
        return
    from dedup_service.observability.metrics import Metrics, share_figures  # noqa: PLC0415
    from dedup_service.observability.metrics_server import MetricsPortTaken, MetricsServer  # noqa: PLC0415

    if worker is not None and worker.figures_folder is not None:
        share_figures(worker.figures_folder, worker.number)
    build = {"version": __version__, "python_version": platform.python_version(), "engine": settings.engine}
    metrics = Metrics(SERVICE_NAME, METHODS, build)
    if worker is not None:
        yield metrics
        return
    try:
        server = MetricsServer(settings.metrics_listen, metrics.registry)
    except MetricsPortTaken as taken:
        raise StartRefused(str(taken)) from None
    logger().info("metrics_listener_started", address=server.address)
    try:
        yield metrics
    finally:
        server.close()


async def follow_calls(metrics: "Metrics", admission: Admission) -> None:
    """Tell the metrics again and again how many calls are under way, for ever.

    Cheaper than to tell them at each call, and no scrape sees more.
    """
    while True:
        metrics.in_flight.set(admission.under_way)
        await asyncio.sleep(_SAMPLE_INTERVAL_S)


class CountedClaims(ClaimService):
    """Claims that are counted by namespace and outcome."""

    def __init__(self, store: ClaimStore, policies: Policies, metrics: "Metrics", *, max_result_bytes: int) -> None:
        super().__init__(store, policies, max_result_bytes=max_result_bytes)
        from dedup_service.observability.metrics import OTHER  # noqa: PLC0415

        self._bind = metrics.claims
        self._others = metrics.claims(OTHER)
        default = metrics.claims(DEFAULT_NAMESPACE)
        self._counts = {name: metrics.claims(name) for name in policies.namespaces} | {DEFAULT_NAMESPACE: default}
        self._counts[""] = self._counts[DEFAULT_NAMESPACE]

    async def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Claim, and count how it ended."""
        try:
            answer = await super().claim(request)
        except BaseException:
            self._count(request, None)
            raise
        self._count(request, answer)
        return answer

    async def claim_all(self, requests: Sequence[ClaimRequest]) -> list[ClaimAnswer | Exception]:
        """Claim many, and count how each ended."""
        try:
            answers = await super().claim_all(requests)
        except BaseException:
            for request in requests:
                self._count(request, None)
            raise
        for request, answer in zip(requests, answers, strict=True):
            self._count(request, answer if isinstance(answer, ClaimAnswer) else None)
        return answers

    def _count(self, request: ClaimRequest, answer: ClaimAnswer | None) -> None:
        counts = self._counts.get(request.namespace) or self._counts_of(request.namespace)
        if answer is None:
            counts.outcomes["ERROR"]()
            return
        counts.outcomes[answer.outcome.value]()
        if answer.replayed:
            counts.replayed()
        if answer.shadow_duplicate:
            counts.shadow_duplicate()

    def _counts_of(self, namespace: str) -> "ClaimMetrics":
        # The policy file may have been read anew, with namespaces that were not in it before.
        if namespace not in self.policies.namespaces:
            return self._others
        return self._counts.setdefault(namespace, self._bind(namespace))


class MeasuredStore:
    """A ClaimStore around another one, whose operations are timed and whose checks are counted."""

    def __init__(self, store: ClaimStore, metrics: "StoreMetrics") -> None:
        self._store = store
        self._metrics = metrics
        seconds = metrics.seconds
        self._claim_s, self._get_s = seconds["claim"], seconds["get"]
        self._claim_all_s = seconds["claim_all"]
        self._complete_s, self._release_s, self._extend_s = seconds["complete"], seconds["release"], seconds["extend"]

    @property
    def description(self) -> str:
        """Where the claims are."""
        return self._store.description

    async def open(self) -> None:
        """Begin to serve."""
        await self._store.open()

    async def close(self) -> None:
        """End."""
        await self._store.close()

    async def check(self) -> Sequence[StoreNotice]:
        """Check, and count what was noticed."""
        try:
            notices = await self._store.check()
        except BaseException:
            self._metrics.ready(ready=False)
            raise
        self._metrics.ready(ready=True)
        for notice in notices:
            self._metrics.noticed(forgot=notice.forgot, restarted=notice.restarted)
        return notices

    async def claim(self, claim: Transaction, ttl_ms: int | None) -> Transaction | None:
        """Claim."""
        return await _timed(self._store.claim(claim, ttl_ms), self._claim_s)

    async def claim_all(
        self, claims: Sequence[tuple[Transaction, int | None]]
    ) -> Sequence[Transaction | Exception | None]:
        """Claim many, which are timed as one."""
        return await _timed(self._store.claim_all(claims), self._claim_all_s)

    async def complete(self, completion: Completion) -> Transaction | None:
        """Complete."""
        return await _timed(self._store.complete(completion), self._complete_s)

    async def release(self, release: Release) -> bool:
        """Release."""
        return await _timed(self._store.release(release), self._release_s)

    async def extend(self, extension: Extension) -> Transaction | None:
        """Extend."""
        return await _timed(self._store.extend(extension), self._extend_s)

    async def get(self, namespace: str, transaction_id: str) -> Transaction | None:
        """Look."""
        return await _timed(self._store.get(namespace, transaction_id), self._get_s)


async def _timed(work: Awaitable[AnswerT], seconds: Callable[[float], None]) -> AnswerT:
    begun = time.perf_counter()
    try:
        return await work
    finally:
        seconds(time.perf_counter() - begun)
