"""The life cycle of a server without a server: background tasks, health, and admission."""

import asyncio
import signal
from collections.abc import Sequence
from typing import cast

import pytest
import structlog
from grpc_health.v1 import health_pb2

from dedup_service.api.endpoint import Admission
from dedup_service.api.errors import ServerStopping, TooManyCalls
from dedup_service.api.servicer import SERVICE_NAME
from dedup_service.claims import (
    Applied,
    CheckFailed,
    ClaimService,
    Policies,
    Policy,
    Reason,
    StoreNotice,
    StoreRefused,
    StoreUnavailable,
)
from dedup_service.config.errors import BadSettings, FatalError
from dedup_service.observability.logs import Logger
from dedup_service.server import health, life_cycle
from dedup_service.server.engines import Engine
from dedup_service.server.health import LIVENESS, READINESS, Health
from dedup_service.server.life_cycle import _Drain, _run_until
from tests.support.dict_store import DictStore
from tests.support.polling import eventually

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
OVERALL = ""
POLICIES = Policies(Policy(60_000, 60_000, 60_000))


def logger() -> Logger:
    """Return a logger that `capture_logs` captures."""
    return cast("Logger", structlog.get_logger())


async def for_ever(ended: list[str]) -> None:
    """Run until cancelled, and note that."""
    try:
        await asyncio.Event().wait()
    finally:
        ended.append("cancelled")


async def fail(error: BaseException) -> None:
    """Fail after a turn of the loop."""
    await asyncio.sleep(0)
    raise error


async def test_a_failed_background_task_ends_the_server_with_a_sentence() -> None:
    """A bug in a task cancels the others and raises FatalError; the log has task and cause.

    Protection: the task group of `_run_until`; without it, health would stay at its last word for ever.
    """
    ended: list[str] = []
    bug = ZeroDivisionError("a bug")
    stop: asyncio.Queue[signal.Signals] = asyncio.Queue()
    with structlog.testing.capture_logs() as lines, pytest.raises(FatalError) as caught:
        async with asyncio.timeout(10):
            await _run_until(stop, {"health": fail(bug), "reload": for_ever(ended)}, logger())
    assert str(caught.value) == (
        "a background task failed (ZeroDivisionError): the log has the cause under background_task_failed"
    )
    assert caught.value.exit_code == 1
    assert caught.value.__cause__ is bug
    assert ended == ["cancelled"]
    expected = {"event": "background_task_failed", "log_level": "error", "task": "health", "exc_info": bug}
    assert lines == [expected]


@pytest.mark.parametrize("error", [FatalError("the store is unfit"), BadSettings("a setting is wrong")])
async def test_a_fatal_error_of_a_task_passes_unchanged(error: FatalError) -> None:
    """A sentence for the operator, with its exit code, is neither wrapped nor logged as a bug."""
    ended: list[str] = []
    stop: asyncio.Queue[signal.Signals] = asyncio.Queue()
    with structlog.testing.capture_logs() as lines, pytest.raises(FatalError) as caught:
        async with asyncio.timeout(10):
            await _run_until(stop, {"examination": fail(error), "health": for_ever(ended)}, logger())
    assert caught.value is error
    assert caught.value.__cause__ is None
    assert ended == ["cancelled"]
    assert not lines


async def test_a_signal_cancels_the_tasks() -> None:
    """SIGTERM ends every task, without an error and without a line in the log."""
    ended: list[str] = []
    stop: asyncio.Queue[signal.Signals] = asyncio.Queue()
    background = {"health": for_ever(ended), "reload": for_ever(ended)}
    with structlog.testing.capture_logs() as lines:
        server = asyncio.create_task(_run_until(stop, background, logger()))
        await asyncio.sleep(0.01)
        stop.put_nowait(signal.SIGTERM)
        await asyncio.wait_for(server, 10)
    assert ended == ["cancelled"] * 2
    assert not lines


async def test_only_the_first_signal_is_taken() -> None:
    """A second signal stays in the queue, where the drain finds it."""
    stop: asyncio.Queue[signal.Signals] = asyncio.Queue()
    stop.put_nowait(signal.SIGTERM)
    stop.put_nowait(signal.SIGINT)
    await _run_until(stop, {"health": for_ever([])}, logger())
    assert stop.get_nowait() is signal.SIGINT


async def test_a_task_that_ends_well_does_not_end_the_server() -> None:
    """The late examination and the sampling without metrics return, and the server goes on."""
    ended: list[str] = []
    stop: asyncio.Queue[signal.Signals] = asyncio.Queue()
    server = asyncio.create_task(_run_until(stop, {"metrics": asyncio.sleep(0), "health": for_ever(ended)}, logger()))
    await asyncio.sleep(0.01)
    assert not server.done()
    assert not ended
    stop.put_nowait(signal.SIGTERM)
    await server


class CheckedStore(DictStore):
    """A store whose checks do what the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: Exception | None = None
        self.notices: Sequence[StoreNotice] = ()
        self.hangs = False
        self.checks = 0

    async def check(self) -> Sequence[StoreNotice]:
        """Check."""
        self.checks += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure
        return self.notices


async def statuses(state: Health) -> dict[str, int]:
    """Return the status of every service, as a probe sees it."""

    class Context:
        def set_trailing_metadata(self, _: object) -> None:
            """Ignore the history."""

    names = (OVERALL, SERVICE_NAME, READINESS, LIVENESS)
    replies = [await state.servicer.Check(health_pb2.HealthCheckRequest(service=name), Context()) for name in names]
    return dict(zip(names, [reply.status for reply in replies], strict=True))


def all_but_liveness(status: int) -> dict[str, int]:
    """Return the statuses of a live process whose store is, or is not, ready."""
    return {OVERALL: status, SERVICE_NAME: status, READINESS: status, LIVENESS: SERVING}


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (StoreUnavailable(Reason.STORE_LOADING, "loading", Applied.NO), "STORE_LOADING"),
        (StoreRefused("too old"), "STORE_REFUSED"),
        (TimeoutError(), "STORE_TIMEOUT"),
        (ZeroDivisionError("a bug"), "INTERNAL"),
        (KeyError("role"), "INTERNAL"),
        (OSError("broken pipe"), "INTERNAL"),
    ],
)
async def test_health_survives_any_exception_of_the_store_and_recovers(failure: Exception, reason: str) -> None:
    """Whatever a check raises, health reports NOT_SERVING, and SERVING after the next good check.

    Protection: `check` catches every exception. Otherwise the watch died, and health stayed SERVING for ever.
    """
    store = CheckedStore()
    state = Health(store, 1_000, logger())
    with structlog.testing.capture_logs() as lines:
        await state.check()
        assert await statuses(state) == all_but_liveness(SERVING)
        store.failure = failure
        await state.check()
        await state.check()
        assert await statuses(state) == all_but_liveness(NOT_SERVING)
        store.failure = None
        await state.check()
        assert await statuses(state) == all_but_liveness(SERVING)
    # Changes alone are logged.
    assert [line["event"] for line in lines] == [
        *("store_became_ready", "store_became_unavailable", "store_became_ready")
    ]
    assert (lines[1]["log_level"], lines[1]["reason"]) == ("warning", reason)


async def test_the_watch_goes_on_after_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """The background task itself survives, and later reports the recovery."""
    monkeypatch.setattr(health, "CHECK_INTERVAL_S", 0.001)
    store = CheckedStore()
    store.failure = ZeroDivisionError("a bug")
    state = Health(store, 1_000, logger())
    watch = asyncio.create_task(state.watch())

    async def checked_again() -> bool:
        return store.checks > 3

    async def recovered() -> bool:
        return await statuses(state) == all_but_liveness(SERVING)

    await eventually(checked_again)
    assert not watch.done()
    assert not state.store_answered.is_set()
    store.failure = None
    await eventually(recovered)
    assert state.store_answered.is_set()
    watch.cancel()


async def test_a_store_that_hangs_is_not_serving() -> None:
    """A check without an answer ends after twice the timeout of the store.

    Protection: the timeout in `check`.
    """
    store = CheckedStore()
    store.hangs = True
    state = Health(store, 5, logger())
    with structlog.testing.capture_logs() as lines:
        async with asyncio.timeout(5):
            await state.check()
    assert await statuses(state) == all_but_liveness(NOT_SERVING)
    assert lines[0]["reason"] == "STORE_TIMEOUT"


async def test_readiness_may_ignore_the_store() -> None:
    """With `follows_store` off, an outage is logged and readiness stays SERVING until the shutdown."""
    store = CheckedStore()
    store.failure = StoreUnavailable(Reason.STORE_UNREACHABLE, "down", Applied.NO)
    state = Health(store, 1_000, logger(), follows_store=False)
    await state.check()
    assert await statuses(state) == all_but_liveness(SERVING)
    await state.stop_serving()
    assert await statuses(state) == all_but_liveness(NOT_SERVING)


async def test_notices_of_the_store_are_logged_and_counted() -> None:
    """Lost claims and restarts appear in the log and in the metadata of health replies."""
    store = CheckedStore()
    store.notices = [StoreNotice("claims_forgotten", "gone", forgot=True, restarted=True)]
    state = Health(store, 1_000, logger())
    with structlog.testing.capture_logs() as lines:
        await state.check()
        await state.check()
    events = [(line["event"], line["log_level"]) for line in lines]
    assert events.count(("claims_forgotten", "warning")) == 2
    metadata = dict(state.history.metadata())
    assert (metadata["dedup-store-forgotten"], metadata["dedup-store-restarts"]) == ("2", "2")
    assert "dedup-store-last-forgotten" in metadata


async def test_notices_of_a_failed_check_are_reported_too() -> None:
    """Lost claims are reported at once, although the store refuses claims now.

    Protection: CheckFailed carries the notices.
    """
    store = CheckedStore()
    refused = StoreUnavailable(Reason.STORE_NOT_REPLICATED, "no replica", Applied.UNKNOWN)
    store.failure = CheckFailed(refused, [StoreNotice("claims_forgotten", "gone", forgot=True)])
    state = Health(store, 1_000, logger())
    with structlog.testing.capture_logs() as lines:
        await state.check()
    assert [line["event"] for line in lines] == ["claims_forgotten", "store_became_unavailable"]
    assert lines[1]["reason"] == "STORE_NOT_REPLICATED"
    assert state.history.forgotten == 1
    assert await statuses(state) == all_but_liveness(NOT_SERVING)


@pytest.mark.parametrize(("reason", "answered"), [("STORE_OUT_OF_MEMORY", True), ("STORE_UNREACHABLE", False)])
async def test_a_store_that_refuses_claims_has_answered(reason: str, *, answered: bool) -> None:
    """A store that refuses claims can be examined, and one that is out of reach cannot."""
    store = CheckedStore()
    store.failure = StoreUnavailable(Reason(reason), "refused", Applied.NO)
    state = Health(store, 1_000, logger())
    await state.check()
    assert state.store_answered.is_set() is answered


async def test_admission_limits_calls_in_flight() -> None:
    """A call beyond the limit is rejected and not counted, and a slot is free after `leave`."""
    admission = Admission(2)
    admission.enter()
    admission.enter()
    with pytest.raises(TooManyCalls, match="2 calls are in flight"):
        admission.enter()
    assert admission.in_flight == 2
    admission.leave()
    admission.enter()
    assert admission.rejected == 0


async def test_holders_have_a_limit_of_their_own() -> None:
    """Other calls cannot lock out holders, whose number is limited too."""
    admission = Admission(1)
    admission.enter()
    admission.enter(holder=True)
    with pytest.raises(TooManyCalls, match="1 calls of holders are in flight"):
        admission.enter(holder=True)
    admission.leave()
    admission.enter()
    admission.leave()
    admission.leave(holder=True)
    await asyncio.wait_for(admission.idle(), 1)


async def test_waiting_calls_leave_room_for_others() -> None:
    """A call that waits is not in flight, and the drain still waits for it."""
    waiting = 0
    admission = Admission(1, lambda: waiting)
    admission.enter()
    waiting = 1
    assert admission.in_flight == 0
    admission.enter()
    with pytest.raises(TooManyCalls):
        admission.enter()
    admission.leave()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(admission.idle(), 0.01)


async def test_a_closed_admission_rejects_new_calls_and_counts_them() -> None:
    """The drain ends once no call has been rejected for a while, so it needs the count."""
    admission = Admission(1)
    admission.enter()
    admission.close()
    for _ in range(2):
        with pytest.raises(ServerStopping):
            admission.enter()
    assert (admission.in_flight, admission.rejected) == (1, 2)


async def test_idle_waits_for_the_last_call() -> None:
    """`idle` returns at once without calls, and else when the last one leaves."""
    admission = Admission(2)
    await asyncio.wait_for(admission.idle(), 1)
    admission.enter()
    admission.enter()
    idle = asyncio.create_task(admission.idle())
    admission.leave()
    await asyncio.sleep(0)
    assert not idle.done()
    admission.leave()
    await asyncio.wait_for(idle, 1)
    # A later call makes it busy again.
    admission.enter()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(admission.idle(), 0.01)


class StoppedEngine:
    """Notes whether it was stopped."""

    def __init__(self, *, cancels_unseen_calls: bool) -> None:
        self.cancels_unseen_calls = cancels_unseen_calls
        self.stopped = False

    async def stop(self, _: float | None) -> None:
        """Note it."""
        self.stopped = True


def a_drain(admission: Admission) -> _Drain:
    """Return a drain over a dict store."""
    store = DictStore()
    return _Drain(Health(store, 1_000, logger()), admission, ClaimService(store, POLICIES), store)


@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.parametrize("trouble", ["none", "no CPU time", "a call that does not end"])
async def test_an_engine_is_not_stopped_if_it_might_cancel_calls(
    monkeypatch: pytest.MonkeyPatch,
    cancels: bool,  # noqa: FBT001
    trouble: str,
) -> None:
    """After a drain that was late or has left calls, an engine that would cancel calls is left alone.

    Protections: the drain notes pauses that end late, and calls that do not end.
    """
    monkeypatch.setattr(life_cycle, "_LATE_S", -1.0 if trouble == "no CPU time" else 1_000.0)
    monkeypatch.setattr(life_cycle, "_QUIET_TIMEOUT_S", 0.01 if trouble.startswith("a call") else 1_000.0)
    admission = Admission(1)
    if trouble.startswith("a call"):
        admission.enter()
    drain = a_drain(admission)
    engine = StoppedEngine(cancels_unseen_calls=cancels)
    with structlog.testing.capture_logs():
        await drain.run(10, asyncio.Queue(), logger())
    await drain.stop(cast("Engine", engine))
    assert engine.stopped is drain.complete is (trouble == "none" or not cancels)


async def test_the_drain_waits_for_calls_that_come_late() -> None:
    """The engine is stopped only after a while in which no call was rejected.

    Protection: the drain pauses once more after each rejection, and at least once.
    """
    admission = Admission(1)
    drain = a_drain(admission)

    async def call() -> None:
        for _ in range(3):
            await asyncio.sleep(life_cycle._QUIET_S / 2)
            with pytest.raises(ServerStopping):
                admission.enter()

    admission.close()
    calls = asyncio.create_task(call())
    await drain._until_quiet()
    assert calls.done()
