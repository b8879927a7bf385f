"""Error mapping around every rpc: each store exception becomes the documented status, and nothing else leaks."""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from dedup.v1 import dedup_pb2
from dedup_service.api.errors import RETRY_AFTER_MS
from dedup_service.claims import (
    Applied,
    Completion,
    Expiry,
    Extension,
    Reason,
    Release,
    StoreNotice,
    StoreRefused,
    StoreUnavailable,
    Transaction,
    UnreadableValue,
)
from dedup_service.config.settings import EngineName
from tests.support.claims import a_claim
from tests.support.in_process import serving

pytestmark = pytest.mark.every_engine

SECRET = "redis://:hunter2@10.0.0.1"


class FailingStore:
    """A store whose every call raises or returns the given answer."""

    description = "failing"

    def __init__(self, answer: Exception | Transaction | None) -> None:
        self._answer = answer

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    async def check(self) -> Sequence[StoreNotice]:
        """Report nothing."""
        return ()

    async def claim(self, _: Transaction, __: Expiry) -> Transaction | None:
        """Raise or answer."""
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    async def claim_all(self, claims: Sequence[tuple[Transaction, Expiry]]) -> list[Transaction | Exception | None]:
        """Answer each."""
        return [self._answer for _ in claims]

    async def complete(self, _: Completion) -> Transaction | None:
        """Raise or answer."""
        return await self.claim(a_claim("x"), Expiry(0))

    async def release(self, _: Release) -> bool:
        """Raise or answer."""
        return await self.claim(a_claim("x"), Expiry(0)) is not None

    async def extend(self, _: Extension) -> Transaction | None:
        """Raise or answer."""
        return await self.claim(a_claim("x"), Expiry(0))

    async def get(self, _: str, __: str) -> Transaction | None:
        """Raise or answer."""
        return await self.claim(a_claim("x"), Expiry(0))


CASES: dict[str, tuple[Callable[[], Exception], grpc.StatusCode, str, str, bool]] = {
    "unavailable, not applied": (
        lambda: StoreUnavailable(Reason.STORE_LOADING, "loading", Applied.NO),
        *(grpc.StatusCode.UNAVAILABLE, "STORE_LOADING", "no", True),
    ),
    "unavailable, unknown": (
        lambda: StoreUnavailable(Reason.STORE_TIMEOUT, "late", Applied.UNKNOWN),
        *(grpc.StatusCode.UNAVAILABLE, "STORE_TIMEOUT", "unknown", True),
    ),
    "refused": (lambda: StoreRefused("too old"), grpc.StatusCode.UNAVAILABLE, "STORE_REFUSED", "no", False),
    "unreadable": (
        lambda: UnreadableValue(Reason.VALUE_DAMAGED, "damaged"),
        *(grpc.StatusCode.FAILED_PRECONDITION, "VALUE_DAMAGED", "no", False),
    ),
    "a bug": (lambda: RuntimeError(SECRET), grpc.StatusCode.INTERNAL, "INTERNAL", "unknown", False),
    "another bug": (lambda: KeyError(SECRET), grpc.StatusCode.INTERNAL, "INTERNAL", "unknown", False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["claim", "get"])
async def test_store_failures_map_to_the_error_table(case: str, method: str, unique: str, engine: EngineName) -> None:
    """Code, reason, applied and retry advice match the table, and the log line agrees.

    Protection: the outermost guard. Without it gRPC puts the text of an unexpected exception into the status.
    """
    make, code, reason, applied, retry = CASES[case]
    if method == "get" and code is grpc.StatusCode.UNAVAILABLE:
        # A look-up never changes anything.
        applied = "no"
    log = io.StringIO()
    async with serving(FailingStore(make()), log, engine) as stub:
        calls: dict[str, Callable[[], Any]] = {
            "claim": lambda: stub.ClaimTransaction(dedup_pb2.ClaimTransactionRequest(transaction_id=unique)),
            "get": lambda: stub.GetTransaction(dedup_pb2.GetTransactionRequest(transaction_id=unique)),
        }
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await calls[method]()
    error = caught.value
    assert error.code() is code
    assert "hunter2" not in repr(error)
    assert "x-correlation-id" in error.trailing_metadata()
    status = rpc_status.from_call(error)
    assert status is not None
    info, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, info.metadata["applied"]) == (reason, "dedup.v1", applied)
    assert [detail.Unpack(delay) for detail in status.details[1:]] == ([True] if retry else [])
    assert delay.retry_delay.ToMilliseconds() == (RETRY_AFTER_MS if retry else 0)

    line = json.loads(log.getvalue())
    assert (line["code"], line["reason"], line["applied"]) == (code.name, reason, applied)
    if code is grpc.StatusCode.INTERNAL:
        assert line["incident"] in (error.details() or "")
        assert "hunter2" in line["exception"]


async def test_a_stored_token_is_never_shown_to_other_callers(unique: str, engine: EngineName) -> None:
    """A duplicate's reply and log line show the holder without its token."""
    log = io.StringIO()
    holder = a_claim(unique, token="the-holders-secret")
    async with serving(FailingStore(holder), log, engine) as stub:
        reply = await stub.ClaimTransaction(dedup_pb2.ClaimTransactionRequest(transaction_id=unique))
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE
    assert b"the-holders-secret" not in reply.SerializeToString()
    assert "the-holders-secret" not in log.getvalue()
    assert "the-holders-secret" not in repr(holder)


def test_the_zero_value_of_every_enum_is_unspecified() -> None:
    """An empty reply must not read as CLAIMED."""
    enums = dedup_pb2.DESCRIPTOR.enum_types_by_name.values()
    assert len(list(enums)) == 5
    assert all(enum.values_by_number[0].name.endswith("_UNSPECIFIED") for enum in enums)
    assert dedup_pb2.ClaimTransactionResponse().outcome != dedup_pb2.CLAIM_OUTCOME_CLAIMED
