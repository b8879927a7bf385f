"""Claims fresh transactions with many callers: through the plain stub, or the Python client with or without coalescing.

Prints a JSON object: number of claims, duration and latencies. clients/go/internal/claimload has the same flags and
output.
"""

import argparse
import asyncio
import json
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import grpc.aio

from benchmarks.results import percentile
from dedup import Claim, Client, DuplicateTransaction, aio
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

KINDS = ("plain", "unary", "adaptive")
# Outlasts a stall of a busy machine.
_TIMEOUT_S = 10.0


class Window:
    """The measured time, after the warm-up; callers stop at its end."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._begin = time.perf_counter() + seconds / 10
        self._end = self._begin + seconds

    def over(self, answered: float) -> bool:
        """Whether an answer at this time ends its caller."""
        return answered > self._end

    def counts(self, answered: float) -> bool:
        """Whether an answer at this time is measured."""
        return self._begin < answered <= self._end


class WrongAnswer(Exception):
    """A fresh id was not claimed, or a held id was claimed again."""


class Held(Exception):
    """A claim through the plain stub was a duplicate."""


def request(transaction_id: str) -> dedup_pb2.ClaimTransactionRequest:
    """Return the request of a program without the client."""
    return dedup_pb2.ClaimTransactionRequest(transaction_id=transaction_id, claim_token=secrets.token_urlsafe(16))


def check_reply(reply: dedup_pb2.ClaimTransactionResponse, transaction_id: str) -> None:
    """Raise Held for a duplicate, and WrongAnswer unless this id was claimed."""
    if reply.outcome == dedup_pb2.CLAIM_OUTCOME_DUPLICATE:
        raise Held
    claimed = reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED
    if not claimed or reply.transaction.transaction_id != transaction_id:
        raise WrongAnswer(f"a fresh claim of {transaction_id} was answered with {reply}")


def check(claim: aio.Claim | Claim, transaction_id: str) -> None:
    """Raise WrongAnswer unless `claim` holds this id. It is a replay if its batch was late."""
    if claim.transaction is None or claim.transaction.transaction_id != transaction_id:
        raise WrongAnswer(f"a fresh claim of {transaction_id} was answered with {claim.transaction}")


@asynccontextmanager
async def awaited(target: str, kind: str) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """Provide a function that claims an id."""
    if kind == "plain":
        async with grpc.aio.insecure_channel(target) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)

            async def claim_plainly(transaction_id: str) -> None:
                reply: Any = await stub.ClaimTransaction(request(transaction_id), timeout=_TIMEOUT_S)
                check_reply(reply, transaction_id)

            yield claim_plainly
        return
    async with aio.Client(target, timeout=_TIMEOUT_S, coalesce=kind == "adaptive") as client:

        async def claim(transaction_id: str) -> None:
            check(await client.claim(transaction_id), transaction_id)

        yield claim


async def awaiting(target: str, callers: int, window: Window, prefix: str, kind: str) -> list[float]:
    """Claim with this many tasks, and return the latencies in seconds."""
    latencies: list[float] = []

    async def caller(claim: Callable[[str], Awaitable[None]], name: str) -> None:
        number = 0
        while True:
            transaction_id = f"{name}:{number}"
            sent = time.perf_counter()
            await claim(transaction_id)
            answered = time.perf_counter()
            if window.counts(answered):
                latencies.append(answered - sent)
            if window.over(answered):
                break
            number += 1
        try:
            await claim(transaction_id)
        except (DuplicateTransaction, Held):
            return
        raise WrongAnswer(f"{transaction_id} was claimed twice")

    async with awaited(target, kind) as claim:
        await asyncio.gather(*(caller(claim, f"{prefix}:{number}") for number in range(callers)))
    return latencies


class Thread(threading.Thread):
    """One blocking caller, with its latencies in seconds and its failure."""

    def __init__(self, claim: Callable[[str], None], prefix: str, window: Window) -> None:
        super().__init__()
        self.latencies: list[float] = []
        self.failure: Exception | None = None
        self._claim = claim
        self._prefix = prefix
        self._window = window

    def run(self) -> None:
        """Claim until the window ends, then the last id again."""
        try:
            last = self._claim_for_a_while()
        except Exception as error:  # noqa: BLE001 - raised by the main thread
            self.failure = error
            return
        try:
            self._claim(last)
        except (DuplicateTransaction, Held):
            return
        except Exception as error:  # noqa: BLE001 - as above
            self.failure = error
        else:
            self.failure = WrongAnswer(f"{last} was claimed twice")

    def _claim_for_a_while(self) -> str:
        number = 0
        while True:
            transaction_id = f"{self._prefix}:{number}"
            sent = time.perf_counter()
            self._claim(transaction_id)
            answered = time.perf_counter()
            if self._window.counts(answered):
                self.latencies.append(answered - sent)
            if self._window.over(answered):
                return transaction_id
            number += 1


@contextmanager
def called(target: str, kind: str) -> Iterator[Callable[[str], None]]:
    """Provide a function that claims an id."""
    if kind == "plain":
        with grpc.insecure_channel(target) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            yield lambda name: check_reply(stub.ClaimTransaction(request(name), timeout=_TIMEOUT_S), name)
        return
    with Client(target, timeout=_TIMEOUT_S, coalesce=kind == "adaptive") as client:
        yield lambda name: check(client.claim(name), name)


def blocking(target: str, callers: int, window: Window, prefix: str, kind: str) -> list[float]:
    """Claim with this many threads, and return the latencies in seconds."""
    with called(target, kind) as claim:
        threads = [Thread(claim, f"{prefix}:{number}", window) for number in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for thread in threads:
        if thread.failure is not None:
            raise thread.failure
    return [latency for thread in threads for latency in thread.latencies]


def round_of(latencies: Sequence[float], seconds: float) -> dict[str, float]:
    """Return the figures of one round. Raises ValueError without latencies."""
    ordered = sorted(round(latency * 1e6) for latency in latencies)
    p50, p99 = (percentile(ordered, percent) / 1_000 for percent in (50, 99))
    return {"claims": len(ordered), "seconds": seconds, "p50_ms": p50, "p99_ms": p99}


def main() -> None:
    """Print the figures of a round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--client", choices=("aio", "sync"), required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--callers", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--prefix", required=True, help="prefix of every transaction id; must differ in each run")
    parser.add_argument("--kind", choices=KINDS, default="adaptive", help="the plain stub, or the client")
    options = parser.parse_args()
    window = Window(options.seconds)
    asked = (options.target, options.callers, window, options.prefix, options.kind)
    latencies = asyncio.run(awaiting(*asked)) if options.client == "aio" else blocking(*asked)
    sys.stdout.write(json.dumps(round_of(latencies, options.seconds)) + "\n")


if __name__ == "__main__":
    main()
