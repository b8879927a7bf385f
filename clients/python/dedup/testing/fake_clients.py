"""The real clients over a service in memory: what is decided above the wire is the real thing."""

from google.protobuf.message import Message

from dedup import aio
from dedup.calls import Calls, OnUnavailable
from dedup.client import Client
from dedup.handles import OnError
from dedup.retries import Retrier, RetryPolicy
from dedup.steps import Send
from dedup.testing.fake_service import FakeService


class _Transport:
    """Attempts answered from memory. Pauses take no time, but count against the budget."""

    def __init__(self, service: FakeService) -> None:
        self._service = service
        self._paused_s = 0.0

    def now(self) -> float:
        return self._paused_s

    def send(self, step: Send) -> Message:
        return self._service.answer(step.method, step.request)

    def pause(self, seconds: float) -> None:
        self._paused_s += seconds

    def close(self) -> None:
        """There is nothing to close."""


class _AsyncTransport:
    """The same for callers that await."""

    def __init__(self, inner: _Transport) -> None:
        self._inner = inner

    async def send(self, step: Send) -> Message:
        return self._inner.send(step)

    async def pause(self, seconds: float) -> None:
        self._inner.pause(seconds)

    async def close(self) -> None:
        """There is nothing to close."""


class FakeClient(Client):
    """A `dedup.Client` over a FakeService, `service`; several clients may share one."""

    def __init__(
        self,
        service: FakeService | None = None,
        *,
        namespace: str = "",
        claimant: str = "",
        timeout: float = 2.0,
        on_unavailable: OnUnavailable = "deny",
        on_error: OnError = "release",
    ) -> None:
        self.service = service or FakeService()
        transport = _Transport(self.service)
        retrier = Retrier(RetryPolicy(budget_s=timeout), clock=transport.now)
        self._set_up(transport, Calls(retrier, on_unavailable), namespace, claimant, on_error)


class AsyncFakeClient(aio.Client):
    """A `dedup.aio.Client` over a FakeService, `service`; it may share one with a FakeClient."""

    def __init__(
        self,
        service: FakeService | None = None,
        *,
        namespace: str = "",
        claimant: str = "",
        timeout: float = 2.0,
        on_unavailable: OnUnavailable = "deny",
        on_error: OnError = "release",
    ) -> None:
        self.service = service or FakeService()
        transport = _Transport(self.service)
        retrier = Retrier(RetryPolicy(budget_s=timeout), clock=transport.now)
        self._set_up(_AsyncTransport(transport), Calls(retrier, on_unavailable), namespace, claimant, on_error)
