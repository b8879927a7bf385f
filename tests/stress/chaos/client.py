"""One client process: callers contend for transactions, retry with their own tokens and record every attempt."""

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.stress.chaos.history import Call, to_line

# Longer than any run: only a release ends such a claim.
LONG_MS = 3_600_000
SHORT_MS = (300, 700, 1_500)
# Clients derive the ids of contended transactions from the time, so they all move on to new ids together.
EPOCH_NS = 1_000_000_000
CONTENDED = 3

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


class Worker:
    """One caller. Its choices depend on the seed and its name only."""

    def __init__(
        self, config: ClientConfig, number: int, stubs: list[Any], history: TextIO, stopped: asyncio.Future[str]
    ) -> None:
        self._name = f"{config.name}-{number}"
        self._rng = random.Random(f"{config.seed}-{self._name}")
        self._stubs = stubs
        self._history = history
        self._stopped = stopped
        self._calls = 0

    async def run(self) -> None:
        """Make logical calls until `stopped` is done."""
        while not self._stopped.done():
            transaction_id, ttl_ms, clicks = self._choose()
            await asyncio.gather(*(self._claim_and_work(transaction_id, ttl_ms) for _ in range(clicks)))
            await asyncio.sleep(self._rng.uniform(0.005, 0.06))

    async def _claim_and_work(self, transaction_id: str, ttl_ms: int) -> None:
        self._calls += 1
        token = f"caller-{self._name}-{self._calls:06}"
        claim = dedup_pb2.ClaimTransactionRequest(transaction_id=transaction_id, claim_token=token, claimant=token)
        claim.ttl.FromMilliseconds(ttl_ms)
        answer = await self._persist("claim", claim, ttl_ms)
        while answer.outcome == "CLAIMED" and self._rng.random() < 0.15:
            # As if the answer had been lost.
            answer = await self._persist("claim", claim, ttl_ms)
        if answer.outcome != "CLAIMED":
            if answer.outcome == "DUPLICATE" and self._rng.random() < 0.1:
                # As a buggy caller would: end a claim it does not hold.
                await self._end(self._rng.choice(("release", "complete")), transaction_id, token)
            return
        # Sometimes the work outlasts its claim, and then ends a claim that may belong to another caller.
        overrun = ttl_ms < LONG_MS and self._rng.random() < 0.15
        await asyncio.sleep(self._rng.uniform(1, 1.3) * ttl_ms / 1_000 if overrun else self._rng.uniform(0, 0.05))
        what_next = self._rng.random()
        if what_next < 0.55:
            await self._end("release", transaction_id, token)
        elif what_next < 0.75:
            await self._end("complete", transaction_id, token)

    async def _end(self, rpc: str, transaction_id: str, token: str) -> None:
        if rpc == "release":
            release = dedup_pb2.ReleaseTransactionRequest(transaction_id=transaction_id, claim_token=token)
            await self._persist(rpc, release, 0)
            return
        complete = dedup_pb2.CompleteTransactionRequest(
            transaction_id=transaction_id, claim_token=token, result=token.encode()
        )
        complete.ttl.FromMilliseconds(LONG_MS)
        await self._persist(rpc, complete, LONG_MS)

    def _choose(self) -> tuple[str, int, int]:
        """Return the transaction, the ttl and the number of concurrent claims by this caller."""
        kind = self._rng.random()
        if kind < 0.2:
            # A user who clicks repeatedly: the first claims of a new transaction are concurrent.
            return f"click-{self._name}-{self._calls}", LONG_MS, 3
        epoch, number = time.monotonic_ns() // EPOCH_NS, self._rng.randrange(CONTENDED)
        if kind < 0.65:
            return f"long-{epoch}-{number}", LONG_MS, 1
        # A longer epoch, so that callers see several short claims of one transaction end.
        return f"short-{epoch // 4}-{number}", self._rng.choice(SHORT_MS), 1

    async def _persist(self, rpc: str, request: Any, ttl_ms: int) -> Call:
        answer = await self._attempt(rpc, request, ttl_ms)
        for _ in range(_RETRIES):
            if answer.outcome != "ERROR" or answer.code in _NO_RETRY:
                break
            await asyncio.sleep(self._rng.uniform(0, 0.15))
            answer = await self._attempt(rpc, request, ttl_ms)
        return answer

    async def _attempt(self, rpc: str, request: Any, ttl_ms: int) -> Call:
        rng = self._rng
        method = getattr(rng.choice(self._stubs), f"{rpc.capitalize()}Transaction")
        deadline_s = rng.uniform(0.002, 0.05) if rng.random() < 0.05 else rng.uniform(0.3, 1.5)
        cancel_after = rng.uniform(0, 0.02) if rng.random() < 0.05 else None
        begin_ns = time.monotonic_ns()
        answer = await _ask(method, request, deadline_s, cancel_after)
        end_ns = time.monotonic_ns()
        call = Call(
            client=self._name,
            rpc=rpc,
            transaction_id=request.transaction_id,
            token=request.claim_token,
            begin_ns=begin_ns,
            end_ns=end_ns,
            ttl_ms=ttl_ms,
            **answer,
        )
        self._history.write(to_line(call))
        return call


async def _ask(
    method: Callable[..., Any], request: Any, deadline_s: float, cancel_after: float | None
) -> dict[str, Any]:
    """Make one attempt and return its outcome as fields of Call."""
    call = method(request, timeout=deadline_s)
    if cancel_after is not None:
        asyncio.get_running_loop().call_later(cancel_after, call.cancel)
    try:
        reply = await call
    except asyncio.CancelledError:
        return {"outcome": "ERROR", "code": "CANCELLED", "applied": "unknown"}
    except grpc.aio.AioRpcError as error:
        return {"outcome": "ERROR", "code": error.code().name, **_error_info(error)}
    outcome = reply.DESCRIPTOR.fields_by_name["outcome"].enum_type.values_by_number[reply.outcome].name
    answer: dict[str, Any] = {"outcome": outcome.partition("_OUTCOME_")[2]}
    if "transaction" in reply.DESCRIPTOR.fields_by_name and reply.HasField("transaction"):
        answer["holder"] = reply.transaction.claimant
        answer["completed"] = reply.transaction.state == dedup_pb2.TRANSACTION_STATE_COMPLETED
    if isinstance(reply, dedup_pb2.ClaimTransactionResponse):
        answer["replayed"] = reply.replayed
        if answer["outcome"] == "CLAIMED" and reply.claim_token != request.claim_token:
            answer["holder"] = f"the token {reply.claim_token!r}"
    return answer


def _error_info(error: grpc.aio.AioRpcError) -> dict[str, str]:
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return {"reason": info.reason, "applied": info.metadata["applied"]}
    # The error comes from gRPC itself, which does not know whether the call took effect.
    return {"applied": "unknown"}


async def main(config: ClientConfig, history: TextIO) -> None:
    """Run the callers of this process until its standard input closes, which also happens when the runner dies."""
    stopped = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    channels = [grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS) for target in config.targets]
    stubs: list[Any] = [dedup_pb2_grpc.DedupServiceStub(channel) for channel in channels]
    callers = (Worker(config, number, stubs, history, stopped) for number in range(config.workers))
    await asyncio.gather(*(caller.run() for caller in callers))
    for channel in channels:
        await channel.close()


if __name__ == "__main__":
    given = ClientConfig(**json.loads(sys.argv[1]))
    with Path(given.history).open("w") as file:
        asyncio.run(main(given, file))
