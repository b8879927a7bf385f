"""Puts the traces around the rooms that know nothing of them: the store, as the metrics are put around it."""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from dedup_service import __version__
from dedup_service.claims import (
    DEFAULT_NAMESPACE,
    ClaimService,
    ClaimStore,
    Completion,
    Extension,
    Release,
    StoreNotice,
    Transaction,
)
from dedup_service.server.listeners import StartRefused
from dedup_service.api.servicer import SERVICE_NAME
from dedup_service.config.settings import Settings
from dedup_service.stores.redis.url import SCHEMES, parse_redis_url

if TYPE_CHECKING:
    # Who does not ask for traces does not load their library.
    from dedup_service.observability.traces import Attributes, CallTraces, StoreTraces, Traces

# What a script is called stands for its text, which is the same at every call.
_REDIS_COMMANDS: Mapping[str, "Attributes"] = {
    "claim": {"db.operation.name": "SET"},
    "claim_all": {"db.operation.name": "SET"},
    "get": {"db.operation.name": "GET"},
} | {
    name: {"db.operation.name": "EVALSHA", "db.stored_procedure.name": name}
    for name in ("complete", "release", "extend")
}

AnswerT = TypeVar("AnswerT")


@contextmanager
def tracing(settings: Settings) -> Iterator["Traces | None"]:
    """Yield the traces of this process, or None where the settings want none; what is left is sent at the end.

    Raises StartRefused when the package is not installed, or cannot follow its variables.
    """
    if settings.traces == "off":
        yield None
        return
    try:
        from dedup_service.observability.traces import Traces  # noqa: PLC0415
    except ImportError as error:
        raise StartRefused(
            f"DEDUP_TRACES (--traces): OpenTelemetry cannot be loaded ({error}): install dedup-service[otel], or set "
            "DEDUP_TRACES=off"
        ) from None
    try:
        traces = Traces(SERVICE_NAME, __version__)
    except (OSError, ValueError) as error:
        raise StartRefused(
            f"DEDUP_TRACES (--traces): OpenTelemetry refuses its settings ({error}): check the OTEL_* variables, or "
            "set DEDUP_TRACES=off"
        ) from None
    try:
        yield traces
    finally:
        traces.close()


def call_traces(traces: "Traces | None", claims: ClaimService) -> "Callable[[str], CallTraces] | None":
    """Return what makes the spans of the calls of an rpc, by its name.

    Their namespaces are those that the policy file names at the time, as in the metrics.
    """
    if traces is None:
        return None

    def label(namespace: str) -> str:
        name = namespace or DEFAULT_NAMESPACE
        return name if name == DEFAULT_NAMESPACE or name in claims.policies.namespaces else "other"

    return partial(traces.call, label)


def store_traces(traces: "Traces", url: str) -> "StoreTraces":
    """Return the maker of the spans of the store at this URL, which has to be one of a store that there is."""
    scheme = url.partition(":")[0]
    if scheme == "sqlite":
        return traces.store({"db.system.name": "sqlite"}, {})
    attributes: dict[str, str | int] = {"db.system.name": "redis"}
    # Which one of several answers is not known beforehand.
    if scheme in SCHEMES:
        target = parse_redis_url(url)
        attributes |= {"db.namespace": str(target.db), "server.address": target.socket_path or target.host}
        if not target.socket_path:
            attributes["server.port"] = target.port
    return traces.store(attributes, _REDIS_COMMANDS)


class TracedStore:
    """A ClaimStore around another one, whose operations have a span each where the call under way has one."""

    def __init__(self, store: ClaimStore, traces: "StoreTraces") -> None:
        self._store = store
        self._traces = traces

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
        """Check."""
        return await self._store.check()

    async def claim(self, claim: Transaction, ttl_ms: int | None) -> Transaction | None:
        """Claim."""
        return await self._traced("claim", self._store.claim(claim, ttl_ms))

    async def claim_all(
        self, claims: Sequence[tuple[Transaction, int | None]]
    ) -> Sequence[Transaction | Exception | None]:
        """Claim many, in one span; one that fails makes it fail."""
        span = self._traces.begin("claim_all", len(claims))
        if span is None:
            return await self._store.claim_all(claims)
        failure: BaseException | None = None
        try:
            holders = await self._store.claim_all(claims)
            failure = next((holder for holder in holders if isinstance(holder, Exception)), None)
        except BaseException as error:
            failure = error
            raise
        finally:
            self._traces.end(span, failure)
        return holders

    async def complete(self, completion: Completion) -> Transaction | None:
        """Complete."""
        return await self._traced("complete", self._store.complete(completion))

    async def release(self, release: Release) -> bool:
        """Release."""
        return await self._traced("release", self._store.release(release))

    async def extend(self, extension: Extension) -> Transaction | None:
        """Extend."""
        return await self._traced("extend", self._store.extend(extension))

    async def get(self, namespace: str, transaction_id: str) -> Transaction | None:
        """Look."""
        return await self._traced("get", self._store.get(namespace, transaction_id))

    async def _traced(self, operation: str, work: Awaitable[AnswerT]) -> AnswerT:
        span = self._traces.begin(operation)
        if span is None:
            return await work
        failure: BaseException | None = None
        try:
            return await work
        except BaseException as error:
            failure = error
            raise
        finally:
            self._traces.end(span, failure)
