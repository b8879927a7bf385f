"""Claims fresh transactions through the Python client with many callers, coalesced or not.

Prints a JSON object: number of claims, duration and latencies. clients/go/internal/claimload has the same flags and
output.
"""

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Sequence

from benchmarks.results import percentile
from dedup import Client, DuplicateTransaction, aio


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


def check(claim: aio.Claim | object, transaction_id: str) -> None:
    """Raise WrongAnswer unless `claim` newly holds this id."""
    transaction = getattr(claim, "transaction", None)
    if getattr(claim, "replayed", True) or transaction is None or transaction.transaction_id != transaction_id:
        raise WrongAnswer(f"a fresh claim of {transaction_id} was answered with {transaction}")


async def awaiting(target: str, callers: int, window: Window, prefix: str, *, coalesce: bool) -> list[float]:
    """Claim with this many tasks, and return the latencies in seconds."""
    latencies: list[float] = []

    async def caller(client: aio.Client, name: str) -> None:
        number = 0
        while True:
            transaction_id = f"{name}:{number}"
            sent = time.perf_counter()
            claim = await client.claim(transaction_id)
            answered = time.perf_counter()
            check(claim, transaction_id)
            if window.counts(answered):
                latencies.append(answered - sent)
            if window.over(answered):
                break
            number += 1
        try:
            await client.claim(transaction_id)
        except DuplicateTransaction:
            return
        raise WrongAnswer(f"{transaction_id} was claimed twice")

    async with aio.Client(target, coalesce=coalesce) as client:
        await asyncio.gather(*(caller(client, f"{prefix}:{number}") for number in range(callers)))
    return latencies


class Thread(threading.Thread):
    """One blocking caller, with its latencies in seconds and its failure."""

    def __init__(self, client: Client, prefix: str, window: Window) -> None:
        super().__init__()
        self.latencies: list[float] = []
        self.failure: Exception | None = None
        self._client = client
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
            self._client.claim(last)
        except DuplicateTransaction:
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
            claim = self._client.claim(transaction_id)
            answered = time.perf_counter()
            check(claim, transaction_id)
            if self._window.counts(answered):
                self.latencies.append(answered - sent)
            if self._window.over(answered):
                return transaction_id
            number += 1


def blocking(target: str, callers: int, window: Window, prefix: str, *, coalesce: bool) -> list[float]:
    """Claim with this many threads, and return the latencies in seconds."""
    with Client(target, coalesce=coalesce) as client:
        threads = [Thread(client, f"{prefix}:{number}", window) for number in range(callers)]
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
    parser.add_argument("--coalesce", action="store_true")
    options = parser.parse_args()
    window = Window(options.seconds)
    asked = (options.target, options.callers, window, options.prefix)
    if options.client == "aio":
        latencies = asyncio.run(awaiting(*asked, coalesce=options.coalesce))
    else:
        latencies = blocking(*asked, coalesce=options.coalesce)
    sys.stdout.write(json.dumps(round_of(latencies, options.seconds)) + "\n")


if __name__ == "__main__":
    main()
