"""Measures whether a claim costs the same however many are held, and what a held claim takes of Redis' memory.

Redis servers and SQLite files of growing sizes, each with a service of its own, are kept side by side. Rounds go over
all of them, so that noise hits them all, and every figure is paired with that of the smallest in the same round. Then
expired rows of a SQLite file are reclaimed beside live claims (benchmarks/reclaim.py). Linux only. The full run needs
3 GB of memory. Progress goes to standard error.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import redis

from benchmarks import machine, publishing, reclaim
from benchmarks.figures import paired_ratios, spread
from benchmarks.filling import fill_redis, fill_sqlite, transaction_id
from benchmarks.publishing import say
from benchmarks.report import number, table, with_range
from benchmarks.servers import CannotMeasure, Server, Subject, running_redis
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

KINDS = ("fresh", "held")
_FRESH_TTL_MS = 500


class Place:
    """A store of one size, and the service over it."""

    def __init__(self, store: str, size: int, url: str, folder: Path, stack: ExitStack) -> None:
        self.store = store
        self.size = size
        self.url = url
        arguments = ("-m", "dedup_service", "serve", "--log-level", "error", "--store-url", url)
        self.server = Server(Subject(f"{store} {size}", "grpcio", store, (), arguments), folder)
        stack.callback(self.server.stop)
        self.server.start()
        channel = stack.enter_context(grpc.insecure_channel(self.server.target))
        self._stub = dedup_pb2_grpc.DedupServiceStub(channel)
        self._asked = 0
        self.rounds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.redis_us: list[float] = []

    def measure(self, kind: str, claims: int) -> None:
        """Claim one after the other, and keep the median latency in microseconds; raise CannotMeasure when wrong."""
        latencies = []
        for _ in range(claims):
            self._asked += 1
            request = dedup_pb2.ClaimTransactionRequest(
                # A large prime spreads the held ids over all of them.
                transaction_id=f"fresh:{self._asked}" if kind == "fresh" else self._held()
            )
            request.ttl.FromMilliseconds(_FRESH_TTL_MS)
            begun = time.perf_counter()
            outcome = self._stub.ClaimTransaction(request).outcome
            latencies.append((time.perf_counter() - begun) * 1e6)
            expected = dedup_pb2.CLAIM_OUTCOME_CLAIMED if kind == "fresh" else dedup_pb2.CLAIM_OUTCOME_DUPLICATE
            if outcome != expected:
                raise CannotMeasure(f"{self.store}, {self.size}: a {kind} claim was answered with {outcome}")
        self.rounds[kind].append(statistics.median(latencies))

    def _held(self) -> str:
        return transaction_id(self._asked * 7_368_787 % self.size)


def places(sizes: dict[str, list[int]], folder: Path, stack: ExitStack) -> list[Place]:
    """Return filled stores of all sizes, each with its service."""
    found = []
    for size in sizes["redis"]:
        home = folder / f"redis-{size}"
        home.mkdir()
        server = stack.enter_context(running_redis(home))
        fill_redis(server.unix_url, size, _progress(f"Redis with {size:,} claims", size))
        found.append(Place("redis", size, server.unix_url, home, stack))
    for size in sizes["sqlite"]:
        home = folder / f"sqlite-{size}"
        home.mkdir()
        fill_sqlite(home / "claims.db", size, _progress(f"SQLite with {size:,} claims", size))
        found.append(Place("sqlite", size, f"sqlite://{home}/claims.db", home, stack))
    return found


def measure_sizes(sizes: dict[str, list[int]], rounds: int, claims: int) -> list[dict[str, Any]]:
    """Return the rounds of every size, in microseconds a claim."""
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as name, ExitStack() as stack:
        found = places(sizes, Path(name), stack)
        for place in found:
            for kind in KINDS:
                place.measure(kind, claims)
                # Warm-up.
                place.rounds[kind].clear()
        for done in range(rounds):
            say(f"round {done + 1} of {rounds}")
            for kind in KINDS:
                for place in found:
                    place.measure(kind, claims)
        return [
            {"store": each.store, "size": each.size, "us": each.rounds, "redis_set_us": _set_us(each)} for each in found
        ]


def _set_us(place: Place) -> float | None:
    """Return what Redis itself counts for one SET of the service, without the filling, which was done by a script."""
    if place.store != "redis":
        return None
    with redis.Redis.from_url(place.url) as client:
        client.config_resetstat()
        for kind in KINDS:
            place.measure(kind, 500)
            place.rounds[kind].pop()
        stats: Any = client.info("commandstats")
    return float(stats["cmdstat_set"]["usec_per_call"])


def measure_memory(count: int) -> dict[str, Any]:
    """Return what a held claim takes of Redis' memory in bytes, beside a bare `SET key true PX`."""
    found: dict[str, Any] = {"claims": count}
    for name in ("claim", "bare"):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dedup-benchmark-")))
            url = stack.enter_context(running_redis(folder)).unix_url
            client = stack.enter_context(redis.Redis.from_url(url))
            before = client.info("memory")["used_memory"]
            fill_redis(url, count, _progress(f"memory, {name}", count), bare=name == "bare")
            after = client.info("memory")["used_memory"]
            key = f"dedup:default:{transaction_id(0)}"
            found[name] = {
                "key_bytes": len(key),
                "value_bytes": client.strlen(key),
                "used_memory": round((after - before) / count, 1),
                "memory_usage": client.memory_usage(key),
            }
    return found


def measure_all(*, quick: bool) -> dict[str, Any]:
    """Return the figures of every part."""
    largest = {"redis": 4, "sqlite": 4} if quick else {"redis": 7, "sqlite": 6}
    sizes = {store: [10**power for power in range(3, most + 1)] for store, most in largest.items()}
    return {
        "machine": machine.describe(),
        "sizes": measure_sizes(sizes, *((2, 50) if quick else (20, 150))),
        "memory": measure_memory(20_000 if quick else 1_000_000),
        "reclaim": asyncio.run(reclaim.measure(*((20_000, 1.0) if quick else (1_000_000, 45.0)), say)),
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of the documentation."""
    rows = []
    for store in ("redis", "sqlite"):
        ours = [each for each in results["sizes"] if each["store"] == store]
        for each in ours:
            row = [f"{store}, {each['size']:,}"]
            for kind in KINDS:
                row += [number(spread(each["us"][kind]).median)]
                row += [with_range(paired_ratios(each["us"][kind], ours[0]["us"][kind]))]
            rows.append([*row, "" if each["redis_set_us"] is None else number(each["redis_set_us"])])
    header = [
        "claims held",
        "fresh id, µs",
        "to the smallest",
        "held id, µs",
        "to the smallest",
        "SET inside Redis, µs",
    ]
    text = table(header, rows)
    memory = [
        [name, *(str(found[key]) for key in ("key_bytes", "value_bytes", "memory_usage", "used_memory"))]
        for name, found in (
            ("claim of the service", results["memory"]["claim"]),
            ("`SET key true`", results["memory"]["bare"]),
        )
    ]
    text += "\n" + table(["bytes", "key", "value", "MEMORY USAGE", "used_memory a key"], memory)
    parts = []
    for name in ("control", "reclaiming"):
        for what in ("claims", "upkeep"):
            found = results["reclaim"][name][what]
            if found["count"]:
                figures = [number(found[key]) for key in ("p50_ms", "p99_ms", "p99.9_ms", "max_ms")]
                parts.append([f"{name}: {what}", f"{found['count']:,}", *figures, str(found["above_limit"])])
    header = ["SQLite", "count", "p50 ms", "p99 ms", "p99.9 ms", "max ms", f"above {reclaim.PAUSE_LIMIT_MS} ms"]
    return text + "\n" + table(header, parts)


def _progress(what: str, count: int) -> Any:  # noqa: ANN401 - a callback
    said = 0.0

    def progress(done: int) -> None:
        nonlocal said
        if done == count or time.monotonic() - said > 1:
            said = time.monotonic()
            say(f"{what}: {done:,}")

    return progress


def main() -> None:
    """Measure, and publish the figures."""
    chosen = publishing.options(__doc__)
    try:
        results = publishing.earlier(chosen) or measure_all(quick=chosen.quick)
    except CannotMeasure as error:
        sys.exit(f"scale: {error}")
    publishing.publish("scale", results, markdown(results), chosen)


if __name__ == "__main__":
    main()
