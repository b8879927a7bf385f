"""Requests made to be as much work as possible: none holds the event loop for long."""

import sys
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import Any, cast

import grpc
import pytest

from dedup.v1 import dedup_pb2
from dedup_service.api.endpoint import Admission, Context
from dedup_service.api.servicer import DedupServicer, add_to_server
from dedup_service.claims import Caller, CallerNotAllowed, ClaimService, InvalidRequest, Policies, Policy
from tests.support.dict_store import DictStore
from tests.support.malformed import heavy

BATCH = dedup_pb2.BatchClaimTransactionsRequest
# The limit of a batch; those of the other rpcs are lower.
MOST_BYTES = 1024 * 1024 + 64 * 1024
# Calls of functions between two turns of the event loop, of which a millisecond has about 10,000. The requests below
# need 20,000 at most, and without their protection 90,000 to 7,000,000.
MOST_STEPS = 40_000

CASES = heavy(MOST_BYTES - 4_096)


class Aborted(Exception):
    """Raised by `abort`, as in gRPC."""


class FakeContext:
    """The parts of gRPC's context that the endpoint uses."""

    code = grpc.StatusCode.OK
    message = ""
    metadata_bytes = 0

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """Return no metadata."""
        return ()

    def time_remaining(self) -> None:
        """Return that the call has no deadline."""

    async def abort(self, code: grpc.StatusCode, message: str, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        """Keep the status, and end the call."""
        self.code, self.message = code, message
        self.metadata_bytes = len(message) + sum(len(key) + len(value) for key, value in metadata)
        raise Aborted


class Unobserved:
    """Observes nothing."""

    def started(self, _: object) -> None:
        """Do nothing."""

    finished = started


class Handlers:
    """The part of a server that keeps the handlers."""

    def __init__(self) -> None:
        self.of: dict[str, Any] = {}
        claims = ClaimService(DictStore(), Policies(Policy(60_000, 60_000, 60_000)), max_result_bytes=1024 * 1024)
        add_to_server(cast("Any", self), DedupServicer(claims), lambda _: Unobserved(), Admission(1))

    def add_generic_rpc_handlers(self, _: object) -> None:
        """Do nothing."""

    def add_registered_method_handlers(self, _: str, handlers: dict[str, Any]) -> None:
        """Keep the handlers."""
        self.of = handlers


def steps_per_turn(rpc: str, raw: bytes, context: FakeContext) -> list[int]:
    """Serve a request, and return the number of function calls in each turn of the event loop."""
    serving = Handlers().of[rpc].unary_unary(raw, cast("Context", context))
    counts: list[int] = []
    steps: Counter[str] = Counter()

    def count(_: FrameType, event: str, __: object) -> None:
        steps[event] += 1

    while True:
        steps.clear()
        sys.setprofile(count)
        try:
            serving.send(None)
        except (StopIteration, Aborted):
            return counts
        finally:
            sys.setprofile(None)
            counts.append(steps["call"] + steps["c_call"])


@pytest.mark.parametrize("name", CASES)
def test_no_request_holds_the_event_loop(name: str) -> None:
    """The Python work of one turn of the loop is bounded, whatever a request contains, and so is a rejection's size.

    Protections: the limits on the bytes of a request and the entries of a batch; the lenient types, which leave the
    search for faults to the parser; turns within a batch; the limit on violations.
    """
    context = FakeContext()
    rpc, raw = CASES[name]
    assert max(steps_per_turn(rpc, raw, context)) < MOST_STEPS
    assert context.metadata_bytes < 4_096


@pytest.mark.parametrize(("name", "turns"), [("many invalid ids", 2), ("1,000 invalid ids", 3)])
def test_each_pass_over_a_request_has_a_turn_of_its_own(name: str, turns: int) -> None:
    """The event loop serves others between two passes of the parser over a refused request.

    Protection: `decode_request` yields after the first parse of a batch, and before the search for faults.
    """
    rpc, raw = CASES[name]
    assert len(steps_per_turn(rpc, raw, FakeContext())) == turns


@pytest.mark.parametrize(
    ("rpc", "field", "limit"),
    [
        *(
            (rpc, "request", 64 * 1024)
            for rpc in ("ClaimTransaction", "ReleaseTransaction", "ExtendTransaction", "GetTransaction")
        ),
        ("CompleteTransaction", "result", 1024 * 1024 + 64 * 1024),
        ("BatchClaimTransactions", "requests", MOST_BYTES),
    ],
)
def test_a_request_over_the_limit_of_its_rpc_is_refused_unread(rpc: str, field: str, limit: int) -> None:
    """The error names field, size and limit; the largest allowed request is read, and refused for its content."""
    context = FakeContext()
    steps_per_turn(rpc, bytes(limit + 1), context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    sentence = f"the request has {limit + 1} bytes, at most {limit} bytes are allowed for {rpc}: send less"
    assert context.message == f"{field}: {sentence}"
    steps_per_turn(rpc, bytes(limit), context)
    assert "message" in context.message


def test_entries_are_counted_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch with too many entries not one is parsed: 500,000 empty ones would take 50 MB.

    Protection: the entries are counted as bytes.
    """
    parsed: list[bytes] = []
    monkeypatch.setattr(dedup_pb2, "BatchClaimTransactionsRequest", _Spy(BATCH, parsed))
    for name in ("empty entries", "empty entries, cut short", "empty entries after a newer field"):
        context = FakeContext()
        steps_per_turn(*CASES[name], context)
        assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert not parsed


def test_a_rejected_namespace_is_shown_in_part() -> None:
    """The error about a namespace of 60 kB fits into the metadata of a reply, on which clients have a limit."""
    caller = Caller("box", namespaces=frozenset())
    policies = Policies(Policy(60_000, 60_000, 60_000), allow_unknown=False, callers={"box": caller})
    for who, error in ((caller, CallerNotAllowed), (None, InvalidRequest)):
        with pytest.raises(error) as caught:
            policies.of("n" * 60_000, who)
        assert len(str(caught.value)) < 200


class _Spy:
    """A message type with a record of what it parsed."""

    def __init__(self, of: type[dedup_pb2.BatchClaimTransactionsRequest], parsed: list[bytes]) -> None:
        self._of = of
        self._parsed = parsed
        self.DESCRIPTOR = of.DESCRIPTOR

    def FromString(self, raw: bytes) -> object:  # noqa: N802 - protobuf's name
        """Parse a message."""
        self._parsed.append(raw)
        return self._of.FromString(raw)
