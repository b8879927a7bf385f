"""Random sequences of all rpcs, compared with an in-memory model, over each store.

The test sets the model's clock to the real time before each call. Around the expiry of a short claim it waits until the
store must have dropped the claim too.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.polling import wait_until

CLAIMED = dedup_pb2.CLAIM_OUTCOME_CLAIMED
DUPLICATE = dedup_pb2.CLAIM_OUTCOME_DUPLICATE
MISMATCH = dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH

SHORT_MS, LONG_MS = 400, 60_000
# No call is made this close to an expiry in the model: the store's own expiry lies in this window.
BEFORE_MS, AFTER_MS = 150, 150

# Few names, and often the current holder's token: random tokens would hardly ever complete a claim.
HOLDER_TOKEN = "the holder's"
NAMES = st.sampled_from(["one", "two"])
TOKENS = st.sampled_from([HOLDER_TOKEN, HOLDER_TOKEN, "token-number-0001", "token-number-0002"])
FINGERPRINTS = st.sampled_from([b"", b"\x01", b"\xff\xfe"])
RESULTS = st.sampled_from([b"", b"paid", b"\xff" * 300])
LIFETIMES = st.sampled_from([SHORT_MS, LONG_MS])

ReplyT = TypeVar("ReplyT")


def real_ms() -> int:
    """Return the real Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass
class Held:
    """One transaction in the model."""

    token: str
    claimant: str
    fingerprint: bytes
    ends_ms: int
    result: bytes | None = None


class Model:
    """The service as a dictionary and a manual clock."""

    def __init__(self) -> None:
        self.now_ms = real_ms()
        self._held: dict[str, Held] = {}

    def live(self, name: str) -> Held | None:
        """Return the unexpired transaction of this name."""
        held = self._held.get(name)
        return held if held is not None and held.ends_ms > self.now_ms else None

    def next_end_ms(self) -> int | None:
        """Return the earliest expiry in the model."""
        return min((held.ends_ms for name in self._held if (held := self.live(name)) is not None), default=None)

    def claim(self, name: str, claim: Held) -> tuple[int, bool]:
        """Return the outcome and whether it is a replay."""
        held = self.live(name)
        if held is None:
            self._held[name] = claim
            return CLAIMED, False
        if claim.fingerprint and held.fingerprint and claim.fingerprint != held.fingerprint:
            return MISMATCH, False
        if held.token == claim.token and held.result is None:
            return CLAIMED, True
        return DUPLICATE, False

    def complete(self, name: str, token: str, result: bytes, ends_ms: int) -> bool:
        """Return whether the transaction is completed with this result."""
        held = self.live(name)
        if held is None or held.token != token:
            return False
        if held.result is None:
            held.result, held.ends_ms = result, ends_ms
        return held.result == result

    def release(self, name: str, token: str) -> bool:
        """Return whether the claim was released."""
        held = self.live(name)
        if held is None or held.token != token or held.result is not None:
            return False
        del self._held[name]
        return True

    def extend(self, name: str, token: str, ends_ms: int, *, allow_shortening: bool) -> bool:
        """Return whether the claim was extended."""
        held = self.live(name)
        if held is None or held.token != token or held.result is not None:
            return False
        held.ends_ms = ends_ms if allow_shortening else max(held.ends_ms, ends_ms)
        return True


class Machine(RuleBasedStateMachine):
    """Sends each call to the service and the model, and compares the answers."""

    stub: dedup_pb2_grpc.DedupServiceStub
    unique: str
    runs = 0
    all_seen: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        Machine.runs += 1
        self.namespace = f"run-{Machine.runs}-{self.unique[:16]}"
        self.model = Model()
        self.claims = 0
        self.seen: Counter[str] = Machine.all_seen
        self.in_step = True
        """Whether the model still matches the service; False after a call that took too long."""

    def call_service(self, call: Callable[[Any], ReplyT], request: Any) -> ReplyT:
        """Set the model's clock and call the service, away from any expiry."""
        while (end_ms := self.model.next_end_ms()) is not None and real_ms() > end_ms - BEFORE_MS:
            self.wait_past(end_ms)
        self.model.now_ms = begun_ms = real_ms()
        request.namespace = self.namespace
        reply = call(request)
        if real_ms() - begun_ms >= BEFORE_MS:
            # After a stall it is unknown which claims had expired before the store handled the call.
            self.in_step = False
        return reply

    def token_for(self, name: str, token: str) -> str:
        """Return the token, with HOLDER_TOKEN replaced by the current holder's token."""
        held = self.model.live(name)
        if token != HOLDER_TOKEN:
            return token
        return held.token if held is not None else "token-number-0001"

    def wait_past(self, end_ms: int) -> None:
        """Wait until an expiry is over, then update the model's clock."""
        wait_until(lambda: real_ms() > end_ms + AFTER_MS, what="the expiry of a claim")
        self.model.now_ms = real_ms()

    def check_transaction(self, name: str, shown: dedup_pb2.Transaction) -> None:
        """Assert that a returned transaction matches the model."""
        if not self.in_step:
            return
        held = self.model.live(name)
        assert held is not None
        state = dedup_pb2.TRANSACTION_STATE_IN_PROGRESS
        if held.result is not None:
            state = dedup_pb2.TRANSACTION_STATE_COMPLETED
        assert (shown.transaction_id, shown.namespace, shown.claimant, shown.state, shown.result) == (
            *(name, self.namespace, held.claimant, state, held.result or b""),
        )
        assert abs(shown.expire_time.ToMilliseconds() - held.ends_ms) <= BEFORE_MS
        assert shown.HasField("completion_time") == (held.result is not None)

    def new_claim(self, name: str, token: str, fingerprint: bytes, ttl_ms: int) -> dedup_pb2.ClaimTransactionRequest:
        """Return a request with a unique claimant."""
        self.claims += 1
        token = self.token_for(name, token)
        request = dedup_pb2.ClaimTransactionRequest(
            transaction_id=name, claim_token=token, claimant=f"claim {self.claims}", payload_fingerprint=fingerprint
        )
        request.ttl.FromMilliseconds(ttl_ms)
        return request

    def check_claim(
        self, request: dedup_pb2.ClaimTransactionRequest, reply: dedup_pb2.ClaimTransactionResponse
    ) -> None:
        """Assert that the model gives the same answer to a claim."""
        ends_ms = self.model.now_ms + request.ttl.ToMilliseconds()
        claim = Held(request.claim_token, request.claimant, request.payload_fingerprint, ends_ms)
        outcome, replayed = self.model.claim(request.transaction_id, claim)
        if not self.in_step:
            return
        assert (reply.outcome, reply.replayed) == (outcome, replayed)
        self.seen[f"claim {outcome} replayed={replayed} {reply.transaction.state}"] += 1
        assert reply.claim_token == (request.claim_token if outcome == CLAIMED else "")
        self.check_transaction(request.transaction_id, reply.transaction)

    @rule(name=NAMES, token=TOKENS, fingerprint=FINGERPRINTS, ttl_ms=LIFETIMES)
    def claim(self, name: str, token: str, fingerprint: bytes, ttl_ms: int) -> None:
        """ClaimTransaction."""
        request = self.new_claim(name, token, fingerprint, ttl_ms)
        self.check_claim(request, self.call_service(self.stub.ClaimTransaction, request))

    @rule(claims=st.lists(st.tuples(NAMES, TOKENS, FINGERPRINTS, LIFETIMES), min_size=1, max_size=5))
    def batch(self, claims: list[tuple[str, str, bytes, int]]) -> None:
        """BatchClaimTransactions, equal to the same claims one after another."""
        requests = [self.new_claim(*claim) for claim in claims]
        for request in requests:
            request.namespace = self.namespace

        def call(_: object) -> dedup_pb2.BatchClaimTransactionsResponse:
            batch = dedup_pb2.BatchClaimTransactionsRequest(requests=requests)
            reply: dedup_pb2.BatchClaimTransactionsResponse = self.stub.BatchClaimTransactions(batch)
            return reply

        entries = self.call_service(call, requests[0]).entries
        for request, entry in zip(requests, entries, strict=True):
            self.check_claim(request, entry.response)

    @rule(name=NAMES, token=TOKENS, result=RESULTS, ttl_ms=LIFETIMES)
    def complete(self, name: str, token: str, result: bytes, ttl_ms: int) -> None:
        """CompleteTransaction."""
        token = self.token_for(name, token)
        request = dedup_pb2.CompleteTransactionRequest(transaction_id=name, claim_token=token, result=result)
        request.ttl.FromMilliseconds(ttl_ms)
        reply = self.call_service(self.stub.CompleteTransaction, request)
        completed = self.model.complete(name, token, result, self.model.now_ms + ttl_ms)
        if not self.in_step:
            return
        assert (reply.outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED) == completed
        self.seen[f"complete {completed}"] += 1
        assert reply.HasField("transaction") == completed
        if completed:
            self.check_transaction(name, reply.transaction)

    @rule(name=NAMES, token=TOKENS)
    def release(self, name: str, token: str) -> None:
        """ReleaseTransaction."""
        token = self.token_for(name, token)
        request = dedup_pb2.ReleaseTransactionRequest(transaction_id=name, claim_token=token)
        reply = self.call_service(self.stub.ReleaseTransaction, request)
        released = self.model.release(name, token)
        if not self.in_step:
            return
        assert (reply.outcome == dedup_pb2.RELEASE_OUTCOME_RELEASED) == released
        self.seen[f"release {released}"] += 1

    @rule(name=NAMES, token=TOKENS, ttl_ms=LIFETIMES, allow_shortening=st.booleans())
    def extend(self, name: str, token: str, ttl_ms: int, allow_shortening: bool) -> None:  # noqa: FBT001
        """ExtendTransaction."""
        token = self.token_for(name, token)
        request = dedup_pb2.ExtendTransactionRequest(
            transaction_id=name,
            claim_token=token,
            ttl=Duration(seconds=ttl_ms // 1000, nanos=ttl_ms % 1000 * 1_000_000),
            allow_shortening=allow_shortening,
        )
        reply = self.call_service(self.stub.ExtendTransaction, request)
        extended = self.model.extend(name, token, self.model.now_ms + ttl_ms, allow_shortening=allow_shortening)
        if not self.in_step:
            return
        assert (reply.outcome == dedup_pb2.EXTEND_OUTCOME_EXTENDED) == extended
        self.seen[f"extend {extended}"] += 1
        if extended:
            self.check_transaction(name, reply.transaction)

    @rule(names=st.permutations(["one", "two"]))
    def get(self, names: list[str]) -> None:
        """GetTransaction of both names, claimed or not."""
        for name in names:
            request = dedup_pb2.GetTransactionRequest(transaction_id=name)
            found = self.call_service(self._look, request)
            if not self.in_step:
                return
            assert (found is not None) == (self.model.live(name) is not None)
            self.seen[f"get {found is not None}"] += 1
            if found is not None:
                self.check_transaction(name, found.transaction)

    def _look(self, request: dedup_pb2.GetTransactionRequest) -> dedup_pb2.GetTransactionResponse | None:
        call = self.stub.GetTransaction.future(request)
        if call.exception() is None:
            found: dedup_pb2.GetTransactionResponse = call.result()
            return found
        assert call.code().name == "NOT_FOUND"
        return None

    @rule()
    def let_the_next_claim_expire(self) -> None:
        """Wait for the expiry of the next short claim, if there is one."""
        end_ms = self.model.next_end_ms()
        if end_ms is not None and end_ms - real_ms() <= 2 * SHORT_MS:
            self.wait_past(end_ms)
            self.seen["end"] += 1


# Claims by outcome, replayed, and the state in the reply.
ALL_KINDS = {
    *("claim 1 replayed=False 1", "claim 1 replayed=True 1", "claim 2 replayed=False 1", "claim 2 replayed=False 2"),
    *("claim 3 replayed=False 1", "claim 3 replayed=False 2"),
    *("complete True", "complete False", "release True", "release False", "extend True", "extend False"),
    *("get True", "get False", "end"),
}


@pytest.mark.parametrize("sequences", [40, pytest.param(200, marks=[pytest.mark.nightly, pytest.mark.timeout(1800)])])
def test_random_call_sequences_match_the_model(
    stub: dedup_pb2_grpc.DedupServiceStub, unique: str, sequences: int
) -> None:
    """The service answers any sequence of calls as the model does.

    Protection: the store compares the token before it changes anything.
    """
    machine = type("ServiceMachine", (Machine,), {"stub": stub, "unique": unique})
    Machine.all_seen = Counter()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # Every kind of answer must have occurred, or the run proves nothing about it.
    assert set(Machine.all_seen) == ALL_KINDS
    assert min(Machine.all_seen.values()) >= 5, Machine.all_seen
