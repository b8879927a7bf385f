"""One client process: callers contend for transactions, retry with their own tokens and record every attempt."""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import grpc
from google.rpc import error_details_pb2, status_pb2

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.stress.chaos.history import Call, to_line

# Longer than any run: only a release ends such a claim.
LONG_MS = 3_600_000
SHORT_MS = (300, 700, 1_500)
# Clients derive the ids of contended transactions from the time, so they all move on to new ids together.
EPOCH_NS = 1_000_000_000
CONTENDED = 3
# Callers sometimes return to ids of earlier epochs, which a failover may have lost.
REVISITED = 8
# A caller process leaves an id alone after this many attempts, so that every history is short enough to decide. A third
# of them is kept for revisits.
ATTEMPTS_PER_ID = 21

_RETRIES = 6
_NO_RETRY = {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "INTERNAL"}
# gRPC's default reconnect backoff would outlast the faults. Retries are made here, so that each is recorded.
_CHANNEL_OPTIONS = (
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 300),
    # Otherwise channels of one process to one address share a connection.
    ("grpc.use_local_subchannel_pool", 1),
)
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_REQUESTS = {
    "claim": dedup_pb2.ClaimTransactionRequest,
    "complete": dedup_pb2.CompleteTransactionRequest,
    "release": dedup_pb2.ReleaseTransactionRequest,
    "extend": dedup_pb2.ExtendTransactionRequest,
    "get": dedup_pb2.GetTransactionRequest,
}


@dataclass(frozen=True)
class ClientConfig:
    """What one client process runs."""

    name: str
    seed: int
    targets: list[str]
    history: str
    workers: int

    def to_argument(self) -> str:
        """Return the argument for the command line of the process."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Asked:
    """The request of a logical call; its attempts differ in their names only. Fields as in Call."""

    rpc: str
    transaction_id: str
    token: str
    ttl_ms: int = 0
    fingerprint: str = ""
    wait_ms: int = 0
    result: str = ""
    may_shorten: bool = False

    def message(self, name: str) -> Any:
        """Return the message of one attempt."""
        message: Any = _REQUESTS[self.rpc](transaction_id=self.transaction_id)
        if self.rpc != "get":
            message.claim_token = self.token
        if self.ttl_ms:
            message.ttl.FromMilliseconds(self.ttl_ms)
        if self.rpc == "claim":
            message.claimant = name
            message.payload_fingerprint = self.fingerprint.encode()
            if self.wait_ms:
                message.wait.FromMilliseconds(self.wait_ms)
        elif self.rpc == "complete":
            message.result = self.result.encode()
        elif self.rpc == "extend":
            message.allow_shortening = self.may_shorten
        return message


class Worker:
    """One caller. Its choices depend on the seed and its name only."""

    def __init__(
        self,
        config: ClientConfig,
        number: int,
        stubs: list[Any],
        history: TextIO,
        stopped: asyncio.Future[str],
        *,
        attempts: Counter[str],
    ) -> None:
        self._name = f"{config.name}-{number}"
        self._rng = random.Random(f"{config.seed}-{self._name}")
        self._stubs = stubs
        self._history = history
        self._stopped = stopped
        self._attempts = attempts
        self._logical_calls = 0
        self._named = 0

    async def run(self) -> None:
        """Make logical calls until `stopped` is done."""
        rng = self._rng
        while not self._stopped.done():
            if rng.random() < 0.15:
                await self._claim_many(rng.randint(2, 5))
            else:
                transaction_id, ttl_ms, clicks = self._choose()
                await asyncio.gather(*(self._claim_and_work(transaction_id, ttl_ms) for _ in range(clicks)))
            await asyncio.sleep(rng.uniform(0.005, 0.06))

    async def _claim_and_work(self, transaction_id: str, ttl_ms: int) -> None:
        claim = self._claim(transaction_id, ttl_ms)
        if self._rng.random() < 0.2:
            claim = replace(claim, wait_ms=self._rng.randint(50, 1_200))
        await self._work(claim, await self._persist(claim))

    async def _claim_many(self, size: int) -> None:
        chosen = dict(self._choose()[:2] for _ in range(size))
        claims = [self._claim(transaction_id, ttl_ms) for transaction_id, ttl_ms in chosen.items()]
        answers = await self._attempt_batch(claims)

        async def go_on(claim: Asked, answer: Call) -> None:
            # An entry that failed is tried again alone, with the token it had in the batch.
            again = answer.outcome == "ERROR" and answer.code not in _NO_RETRY
            await self._work(claim, await self._persist(claim) if again else answer)

        await asyncio.gather(*(go_on(claim, answer) for claim, answer in zip(claims, answers, strict=True)))

    async def _work(self, claim: Asked, answer: Call) -> None:
        rng, ttl_ms = self._rng, claim.ttl_ms
        while answer.outcome == "CLAIMED" and rng.random() < 0.15:
            # As if the answer had been lost; sometimes with another payload, which is a bug of the caller.
            payload = rng.choice((claim.fingerprint, claim.fingerprint, "another"))
            repeated = await self._persist(replace(claim, fingerprint=payload))
            answer = answer if repeated.outcome == "PAYLOAD_MISMATCH" else repeated
        if answer.outcome != "CLAIMED":
            if answer.outcome == "DUPLICATE" and rng.random() < 0.2:
                # As a buggy caller would: change a claim it does not hold.
                await self._persist(self._change(rng.choice(("release", "complete", "extend")), claim))
            return
        if rng.random() < 0.4:
            extend = self._change("extend", claim)
            await self._persist(extend)
            ttl_ms = extend.ttl_ms
        # Sometimes the work outlasts its claim, and then ends a claim that may belong to another caller.
        overrun = ttl_ms < LONG_MS and rng.random() < 0.2
        await asyncio.sleep(rng.uniform(1, 1.3) * ttl_ms / 1_000 if overrun else rng.uniform(0, 0.05))
        if rng.random() < 0.2:
            await self._persist(self._change("get", claim))
        what_next = rng.random()
        if what_next < 0.45:
            await self._persist(self._change("release", claim))
        elif what_next < 0.75:
            await self._persist(self._change("complete", claim))
        if what_next < 0.75 and rng.random() < 0.4:
            # Too late, but for a look; a second completion may have another result.
            asked = [self._change(rpc, claim) for rpc in ("complete", "release", "extend", "get")]
            await self._persist(rng.choice([*asked, replace(claim, wait_ms=0)]))

    def _claim(self, transaction_id: str, ttl_ms: int) -> Asked:
        self._logical_calls += 1
        token = f"caller-{self._name}-{self._logical_calls:06}"
        kind = self._rng.random()
        payload = transaction_id if kind < 0.7 else "another" if kind < 0.8 else ""
        return Asked("claim", transaction_id, token, ttl_ms, fingerprint=payload)

    def _change(self, rpc: str, claim: Asked) -> Asked:
        rng = self._rng
        asked = Asked(rpc, claim.transaction_id, "" if rpc == "get" else claim.token)
        if rpc == "complete":
            return replace(
                asked, ttl_ms=rng.choice((SHORT_MS[0], LONG_MS, LONG_MS)), result=rng.choice(("good", "bad"))
            )
        if rpc == "extend":
            return replace(asked, ttl_ms=rng.choice((*SHORT_MS, LONG_MS)), may_shorten=rng.random() < 0.3)
        return asked

    def _choose(self) -> tuple[str, int, int]:
        """Return the transaction, the ttl and the number of concurrent claims by this caller."""
        kind, back = self._rng.random(), self._rng.random() < 0.2
        epoch, number = time.monotonic_ns() // EPOCH_NS, self._rng.randrange(CONTENDED)
        if back:
            epoch -= self._rng.randint(1, REVISITED)
        # A longer epoch for short claims, so that callers see several of one transaction end.
        chosen = f"long-{epoch}-{number}" if kind < 0.6 else f"short-{epoch // 4}-{number}"
        if kind < 0.2 or self._attempts[chosen] >= (ATTEMPTS_PER_ID if back else ATTEMPTS_PER_ID * 2 // 3):
            # A user who clicks repeatedly: the first claims of a new transaction are concurrent.
            return f"click-{self._name}-{self._logical_calls}", LONG_MS, 3
        return chosen, LONG_MS if kind < 0.6 else self._rng.choice(SHORT_MS), 1

    async def _persist(self, asked: Asked) -> Call:
        answer = await self._attempt(asked)
        for _ in range(_RETRIES):
            if answer.outcome != "ERROR" or answer.code in _NO_RETRY:
                break
            await asyncio.sleep(self._rng.uniform(0, 0.15))
            answer = await self._attempt(asked)
        return answer

    async def _attempt(self, asked: Asked) -> Call:
        name = self._new_name()
        method = getattr(self._rng.choice(self._stubs), f"{asked.rpc.capitalize()}Transaction")
        begin_ns = time.monotonic_ns()
        message = asked.message(name)
        reply = await self._send(method, message, asked.wait_ms)
        answer = reply if isinstance(reply, dict) else _answer(message, reply)
        return self._record(asked, name, begin_ns, answer)

    async def _attempt_batch(self, claims: Sequence[Asked]) -> list[Call]:
        names = [self._new_name() for _ in claims]
        messages = [claim.message(name) for claim, name in zip(claims, names, strict=True)]
        method = self._rng.choice(self._stubs).BatchClaimTransactions
        begin_ns = time.monotonic_ns()
        reply = await self._send(method, dedup_pb2.BatchClaimTransactionsRequest(requests=messages))
        answers: list[dict[str, Any]] = [reply] * len(claims) if isinstance(reply, dict) else []
        if not answers:
            answers = [_entry(*one) for one in zip(messages, reply.entries, strict=True)]
        return [
            self._record(claim, name, begin_ns, answer, batch=len(claims))
            for claim, name, answer in zip(claims, names, answers, strict=True)
        ]

    async def _send(self, method: Callable[..., Any], message: object, wait_ms: int = 0) -> Any:
        rng = self._rng
        deadline_s = wait_ms / 1_000 + (rng.uniform(0.002, 0.05) if rng.random() < 0.05 else rng.uniform(0.3, 1.5))
        cancel_after = rng.uniform(0, 0.02) if rng.random() < 0.05 else None
        return await _ask(method, message, deadline_s, cancel_after)

    def _record(self, asked: Asked, name: str, begin_ns: int, answer: dict[str, Any], batch: int = 0) -> Call:
        end_ns = time.monotonic_ns()
        call = Call(
            client=self._name, name=name, begin_ns=begin_ns, end_ns=end_ns, batch=batch, **asdict(asked), **answer
        )
        self._attempts[call.transaction_id] += 1
        self._history.write(to_line(call))
        return call

    def _new_name(self) -> str:
        self._named += 1
        return f"{self._name}-{self._named}"


async def _ask(method: Callable[..., Any], request: object, deadline_s: float, cancel_after: float | None) -> object:
    """Make one attempt, and return the reply, or an error as fields of Call."""
    call = method(request, timeout=deadline_s)
    if cancel_after is not None:
        asyncio.get_running_loop().call_later(cancel_after, call.cancel)
    try:
        reply: object = await call
    except asyncio.CancelledError:
        return {"outcome": "ERROR", "code": "CANCELLED", "applied": "unknown"}
    except grpc.aio.AioRpcError as error:
        if (error.details() or "").startswith("failed to connect to all addresses"):
            return {"outcome": "ERROR", "code": error.code().name, "reason": "(not sent)", "applied": "no"}
        details: Any = (error.trailing_metadata() or {}).get("grpc-status-details-bin", b"")
        return _error(error.code(), status_pb2.Status.FromString(details))
    return reply


def _entry(request: dedup_pb2.ClaimTransactionRequest, entry: dedup_pb2.BatchClaimEntry) -> dict[str, Any]:
    if entry.HasField("error"):
        return _error(_CODES[entry.error.code], entry.error)
    return _answer(request, entry.response)


def _answer(request: Any, reply: Any) -> dict[str, Any]:
    """Return a reply as fields of Call."""
    answer: dict[str, Any] = {"outcome": "FOUND"}
    if "outcome" in reply.DESCRIPTOR.fields_by_name:
        outcome = reply.DESCRIPTOR.fields_by_name["outcome"].enum_type.values_by_number[reply.outcome].name
        answer["outcome"] = outcome.partition("_OUTCOME_")[2]
    if "transaction" in reply.DESCRIPTOR.fields_by_name and reply.HasField("transaction"):
        shown = reply.transaction
        answer["holder"] = shown.claimant
        if shown.state == dedup_pb2.TRANSACTION_STATE_COMPLETED:
            answer["held_result"] = shown.result.decode()
        if shown.transaction_id != request.transaction_id:
            answer["holder"] += f" of {shown.transaction_id}"
    if isinstance(reply, dedup_pb2.ClaimTransactionResponse):
        answer["replayed"] = reply.replayed
        if answer["outcome"] == "CLAIMED" and reply.claim_token != request.claim_token:
            answer["holder"] += f" with the token {reply.claim_token!r}"
    return answer


def _error(code: grpc.StatusCode, status: status_pb2.Status) -> dict[str, Any]:
    """Return an error as fields of Call; NOT_FOUND is the answer of a look."""
    if code is grpc.StatusCode.NOT_FOUND:
        return {"outcome": "NOT_FOUND"}
    failed = {"outcome": "ERROR", "code": code.name}
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return failed | {"reason": info.reason, "applied": info.metadata["applied"]}
    # The error comes from gRPC itself, which does not know whether the call took effect.
    return failed | {"applied": "unknown"}


async def main(config: ClientConfig, history: TextIO) -> None:
    """Run the callers of this process until its standard input closes, which also happens when the runner dies."""
    stopped = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    channels = [grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS) for target in config.targets]
    stubs: list[Any] = [dedup_pb2_grpc.DedupServiceStub(channel) for channel in channels]
    attempts: Counter[str] = Counter()
    callers = (Worker(config, number, stubs, history, stopped, attempts=attempts) for number in range(config.workers))
    await asyncio.gather(*(caller.run() for caller in callers))
    for channel in channels:
        await channel.close()


if __name__ == "__main__":
    given = ClientConfig(**json.loads(sys.argv[1]))
    with Path(given.history).open("w") as file:
        asyncio.run(main(given, file))
