"""All rpcs in any order against a plain model in memory, over each store.

The clock of the model is moved by hand and follows the real one, except around the end of a short claim: there the test
waits until the store must have forgotten it too, and only then moves on.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

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
# How long before and after the end that the model knows nothing is asked: the store's own end lies in between.
BEFORE_MS, AFTER_MS = 150, 150

# Few names, and often the token of whoever holds the name at that moment: chance alone would hardly ever complete.
HOLDERS = "the holder's"
NAMES = st.sampled_from(["one", "two"])
TOKENS = st.sampled_from([HOLDERS, HOLDERS, "token-number-0001", "token-number-0002"])
FINGERPRINTS = st.sampled_from([b"", b"\x01", b"\xff\xfe"])
RESULTS = st.sampled_from([b"", b"paid", b"\xff" * 300])
LIFETIMES = st.sampled_from([SHORT_MS, LONG_MS])

ReplyT = TypeVar("ReplyT")


def real_ms() -> int:
    """Return the real Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass
class Held:
    """What the model knows of one transaction."""

    token: str
    claimant: str
    fingerprint: bytes
    ends_ms: int
    result: bytes | None = None


class Model:
    """The service as a dictionary and a clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_ms = real_ms()
        self._held: dict[str, Held] = {}

    def live(self, name: str) -> Held | None:
        """Return what is held and has not ended."""
        held = self._held.get(name)
        return held if held is not None and held.ends_ms > self.now_ms else None

    def next_end_ms(self) -> int | None:
        """Return the next end of anything that is held."""
        return min((held.ends_ms for name in self._held if (held := self.live(name)) is not None), default=None)

    def claim(self, name: str, claim: Held) -> tuple[int, bool]:
        """Return the outcome, and whether it is a replay."""
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
        """Return whether the claim was given back."""
        held = self.live(name)
        if held is None or held.token != token or held.result is not None:
            return False
        del self._held[name]
        return True

    def extend(self, name: str, token: str, ends_ms: int, *, allow_shortening: bool) -> bool:
        """Return whether the token holds the claim, until its new end."""
        held = self.live(name)
        if held is None or held.token != token or held.result is not None:
            return False
        held.ends_ms = ends_ms if allow_shortening else max(held.ends_ms, ends_ms)
        return True


class Machine(RuleBasedStateMachine):
    """Asks the service and the model the same, and compares."""

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
        self.followed = True
        """Whether model and service could be kept in step so far."""

    def ask(self, call: Callable[[Any], ReplyT], request: Any) -> ReplyT:
        """Call the service away from any end, with the model's clock at the present."""
        while (end_ms := self.model.next_end_ms()) is not None and real_ms() > end_ms - BEFORE_MS:
            self.pass_by(end_ms)
        self.model.now_ms = begun_ms = real_ms()
        request.namespace = self.namespace
        reply = call(request)
        if real_ms() - begun_ms >= BEFORE_MS:
            # On a machine that stood still nobody knows what had ended before the store was asked.
            self.followed = False
        return reply

    def token_for(self, name: str, token: str) -> str:
        """Return the token meant: that of the holder, where there is one and it is asked for."""
        held = self.model.live(name)
        if token != HOLDERS:
            return token
        return held.token if held is not None else "token-number-0001"

    def pass_by(self, end_ms: int) -> None:
        """Let the real clock pass an end, and the model's after it."""
        wait_until(lambda: real_ms() > end_ms + AFTER_MS, what="the end of a claim")
        self.model.now_ms = real_ms()

    def show(self, name: str, shown: dedup_pb2.Transaction) -> None:
        """Fail unless a reply shows what the model holds."""
        if not self.followed:
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
        """Return a request whose claimant nobody else has."""
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
        """Fail unless the model answers a claim as the service did."""
        ends_ms = self.model.now_ms + request.ttl.ToMilliseconds()
        claim = Held(request.claim_token, request.claimant, request.payload_fingerprint, ends_ms)
        outcome, replayed = self.model.claim(request.transaction_id, claim)
        if not self.followed:
            return
        assert (reply.outcome, reply.replayed) == (outcome, replayed)
        self.seen[f"claim {outcome} replayed={replayed} {reply.transaction.state}"] += 1
        assert reply.claim_token == (request.claim_token if outcome == CLAIMED else "")
        self.show(request.transaction_id, reply.transaction)

    @rule(name=NAMES, token=TOKENS, fingerprint=FINGERPRINTS, ttl_ms=LIFETIMES)
    def claim(self, name: str, token: str, fingerprint: bytes, ttl_ms: int) -> None:
        """ClaimTransaction."""
        request = self.new_claim(name, token, fingerprint, ttl_ms)
        self.check_claim(request, self.ask(self.stub.ClaimTransaction, request))

    @rule(claims=st.lists(st.tuples(NAMES, TOKENS, FINGERPRINTS, LIFETIMES), min_size=1, max_size=5))
    def batch(self, claims: list[tuple[str, str, bytes, int]]) -> None:
        """BatchClaimTransactions: as the same claims one after another."""
        requests = [self.new_claim(*claim) for claim in claims]
        for request in requests:
            request.namespace = self.namespace

        def call(_: object) -> dedup_pb2.BatchClaimTransactionsResponse:
            batch = dedup_pb2.BatchClaimTransactionsRequest(requests=requests)
            reply: dedup_pb2.BatchClaimTransactionsResponse = self.stub.BatchClaimTransactions(batch)
            return reply

        entries = self.ask(call, requests[0]).entries
        for request, entry in zip(requests, entries, strict=True):
            self.check_claim(request, entry.response)

    @rule(name=NAMES, token=TOKENS, result=RESULTS, ttl_ms=LIFETIMES)
    def complete(self, name: str, token: str, result: bytes, ttl_ms: int) -> None:
        """CompleteTransaction."""
        token = self.token_for(name, token)
        request = dedup_pb2.CompleteTransactionRequest(transaction_id=name, claim_token=token, result=result)
        request.ttl.FromMilliseconds(ttl_ms)
        reply = self.ask(self.stub.CompleteTransaction, request)
        completed = self.model.complete(name, token, result, self.model.now_ms + ttl_ms)
        if not self.followed:
            return
        assert (reply.outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED) == completed
        self.seen[f"complete {completed}"] += 1
        assert reply.HasField("transaction") == completed
        if completed:
            self.show(name, reply.transaction)

    @rule(name=NAMES, token=TOKENS)
    def release(self, name: str, token: str) -> None:
        """ReleaseTransaction."""
        token = self.token_for(name, token)
        request = dedup_pb2.ReleaseTransactionRequest(transaction_id=name, claim_token=token)
        reply = self.ask(self.stub.ReleaseTransaction, request)
        released = self.model.release(name, token)
        if not self.followed:
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
        reply = self.ask(self.stub.ExtendTransaction, request)
        extended = self.model.extend(name, token, self.model.now_ms + ttl_ms, allow_shortening=allow_shortening)
        if not self.followed:
            return
        assert (reply.outcome == dedup_pb2.EXTEND_OUTCOME_EXTENDED) == extended
        self.seen[f"extend {extended}"] += 1
        if extended:
            self.show(name, reply.transaction)

    @rule(names=st.permutations(["one", "two"]))
    def get(self, names: list[str]) -> None:
        """GetTransaction, for what is held and for what is not."""
        for name in names:
            request = dedup_pb2.GetTransactionRequest(transaction_id=name)
            found = self.ask(self._look, request)
            if not self.followed:
                return
            assert (found is not None) == (self.model.live(name) is not None)
            self.seen[f"get {found is not None}"] += 1
            if found is not None:
                self.show(name, found.transaction)

    def _look(self, request: dedup_pb2.GetTransactionRequest) -> dedup_pb2.GetTransactionResponse | None:
        call = self.stub.GetTransaction.future(request)
        if call.exception() is None:
            found: dedup_pb2.GetTransactionResponse = call.result()
            return found
        assert call.code().name == "NOT_FOUND"
        return None

    @rule()
    def let_the_next_claim_end(self) -> None:
        """Let time pass until the next short claim has ended, if there is one."""
        end_ms = self.model.next_end_ms()
        if end_ms is not None and end_ms - real_ms() <= 2 * SHORT_MS:
            self.pass_by(end_ms)
            self.seen["end"] += 1


# Claims by outcome, whether replayed, and the state that the reply shows.
ALL_KINDS = {
    *("claim 1 replayed=False 1", "claim 1 replayed=True 1", "claim 2 replayed=False 1", "claim 2 replayed=False 2"),
    *("claim 3 replayed=False 1", "claim 3 replayed=False 2"),
    *("complete True", "complete False", "release True", "release False", "extend True", "extend False"),
    *("get True", "get False", "end"),
}


def test_any_order_of_calls_agrees_with_the_model(stub: dedup_pb2_grpc.DedupServiceStub, unique: str) -> None:
    """Whatever is asked in whatever order, the service answers as the model does.

    Protection: the token is compared before anything changes.
    """
    machine = type("ServiceMachine", (Machine,), {"stub": stub, "unique": unique})
    Machine.all_seen = Counter()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=120,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # A run that met none of some kind of answer would show nothing about it.
    assert set(Machine.all_seen) == ALL_KINDS
    assert min(Machine.all_seen.values()) >= 5, Machine.all_seen
