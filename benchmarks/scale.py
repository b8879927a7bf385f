"""Measures claims by number of held claims, their memory in Redis, and reclaiming in SQLite.

- Sizes: Redis servers and SQLite files of growing sizes run side by side, each with its own service. Rounds are
  interleaved, and every figure is paired with that of the smallest store.
- Memory: a claim in Redis, compared with `SET key true`.
- Reclaiming: two SQLite stores take turns of a second with the same steady load. One has a backlog of expired rows; the
  other is the control, which shows the noise of disk and machine.

Linux only. The full run needs 3 GB of memory. Progress goes to standard error.
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

from benchmarks import machine, publishing
from benchmarks.filling import fill_redis, fill_sqlite, transaction_id
from benchmarks.publishing import number, say, table, with_range
from benchmarks.results import paired_ratios, percentile, spread
from benchmarks.servers import CannotMeasure, Server, Subject, running_redis
from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.claims import RequestedExpiry, Transaction, system_clock_ms
from dedup_service.stores.sqlite.file import ClaimFile
from dedup_service.stores.sqlite.store import SqliteStore
from dedup_service.stores.sqlite.thread import BatchThread
from dedup_service.stores.stored_value import prefixed_layout

KINDS = ("fresh", "held")
_FRESH_TTL_MS = 500
PAUSE_LIMIT_MS = 5
_PAUSE_S = 0.004
_TURN_S = 1.0


class FilledStore:
    """A store of one size and its service."""

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
        self._count = 0
        self.rounds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.redis_us: list[float] = []

    def measure(self, kind: str, claims: int) -> None:
        """Keep the median latency of sequential claims in µs. Raises CannotMeasure for a wrong answer."""
        latencies = []
        for _ in range(claims):
            self._count += 1
            request = dedup_pb2.ClaimTransactionRequest(
                transaction_id=f"fresh:{self._count}" if kind == "fresh" else self._held()
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
        # Spreads over all held ids.
        return transaction_id(self._count * 7_368_787 % self.size)


def filled_stores(sizes: dict[str, list[int]], folder: Path, stack: ExitStack) -> list[FilledStore]:
    """Return a filled store with its service for each size."""
    found = []
    for size in sizes["redis"]:
        home = folder / f"redis-{size}"
        home.mkdir()
        server = stack.enter_context(running_redis(home))
        fill_redis(server.unix_url, size, _progress(f"Redis with {size:,} claims", size))
        found.append(FilledStore("redis", size, server.unix_url, home, stack))
    for size in sizes["sqlite"]:
        home = folder / f"sqlite-{size}"
        home.mkdir()
        fill_sqlite(home / "claims.db", size, _progress(f"SQLite with {size:,} claims", size))
        found.append(FilledStore("sqlite", size, f"sqlite://{home}/claims.db", home, stack))
    return found


def measure_sizes(sizes: dict[str, list[int]], rounds: int, claims: int) -> list[dict[str, Any]]:
    """Return the latencies of every size by round, in µs."""
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as name, ExitStack() as stack:
        found = filled_stores(sizes, Path(name), stack)
        for filled in found:
            for kind in KINDS:
                filled.measure(kind, claims)
                # Warm-up.
                filled.rounds[kind].clear()
        for done in range(rounds):
            say(f"round {done + 1} of {rounds}")
            for kind in KINDS:
                for filled in found:
                    filled.measure(kind, claims)
        return [
            {"store": each.store, "size": each.size, "us": each.rounds, "redis_set_us": _set_us(each)} for each in found
        ]


def _set_us(filled: FilledStore) -> float | None:
    """Return Redis' own figure for a SET in µs. A script filled it, which does not count."""
    if filled.store != "redis":
        return None
    with redis.Redis.from_url(filled.url) as client:
        client.config_resetstat()
        for kind in KINDS:
            filled.measure(kind, 500)
            filled.rounds[kind].pop()
        stats: Any = client.info("commandstats")
    return float(stats["cmdstat_set"]["usec_per_call"])


def measure_memory(count: int) -> dict[str, Any]:
    """Return the bytes of a held claim in Redis, and of `SET key true PX`."""
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


class TimedFile(ClaimFile):
    """A claim file that times each step of upkeep, and skips upkeep while `turn` is off."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, system_clock_ms)
        self.turn = False
        self.upkeep_us: list[int] = []

    def upkeep(self) -> bool:
        """Take a step, as ClaimFile does."""
        if not self.turn:
            return False
        begun = time.perf_counter()
        more = super().upkeep()
        if more:
            self.upkeep_us.append(round((time.perf_counter() - begun) * 1e6))
        return more


class TimedStore:
    """One store under load."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = TimedFile(path)
        self.claims_us: list[int] = []
        self._number = 0
        self._store = SqliteStore(path, prefixed_layout("dedup:"))
        # SqliteStore.open would use a ClaimFile.
        self._store._thread = BatchThread(self.file, self.file.name, 5.0, 10_000, 0.01)  # noqa: SLF001
        self._store._thread.start()  # noqa: SLF001

    async def take_turn(self, seconds: float) -> None:
        """Claim fresh ids sequentially, with pauses."""
        self.file.turn = True
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self._number += 1
            now_ms = system_clock_ms()
            expiry = RequestedExpiry(ttl_ms=3_600_000).resolve(0, now_ms)
            claim = Transaction("default", f"live:{self._number}", "T" * 22, "", now_ms, expiry.time_ms)
            begun = time.perf_counter()
            if await self._store.claim(claim, expiry) is not None:
                raise AssertionError("a fresh id was held")
            self.claims_us.append(round((time.perf_counter() - begun) * 1e6))
            await asyncio.sleep(_PAUSE_S)
        self.file.turn = False

    async def close(self) -> None:
        """Close the store."""
        await self._store.close()


async def measure_reclaim(rows: int, seconds: float) -> dict[str, Any]:
    """Return both stores' figures, each under load for `seconds`."""
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as folder:
        backlog, control = Path(folder) / "backlog.db", Path(folder) / "control.db"
        fill_sqlite(backlog, rows, _progress("SQLite with expired rows", rows), expired=True)
        fill_sqlite(control, 0, lambda _: None)
        stores = {"control": TimedStore(control), "reclaiming": TimedStore(backlog)}
        turns = max(1, round(seconds / _TURN_S))
        for turn in range(turns):
            for store in stores.values():
                await store.take_turn(min(seconds, _TURN_S))
            say(f"reclaiming, turn {turn + 1} of {turns}")
        figures: dict[str, Any] = {"rows": rows, "seconds": turns * min(seconds, _TURN_S)}
        for name, store in stores.items():
            await store.close()
            figures[name] = {"claims": distribution(store.claims_us), "upkeep": distribution(store.file.upkeep_us)}
        figures["rows_left"] = expired_rows(backlog)
    return figures


def expired_rows(path: Path) -> int:
    """Return the number of expired rows in a closed file."""
    file = ClaimFile(path, system_clock_ms)
    file.begin()
    ((count,),) = file._execute("SELECT count(*) FROM claims WHERE expire_time_ms <= ?", (system_clock_ms(),))  # noqa: SLF001
    file.close()
    return int(count)


def distribution(values_us: list[int]) -> dict[str, float]:
    """Return count, percentiles in milliseconds, and the number above PAUSE_LIMIT_MS."""
    ordered = sorted(values_us)
    if not ordered:
        return {"count": 0}
    figures = {f"p{percent:g}_ms": percentile(ordered, percent) / 1_000 for percent in (50, 99, 99.9)}
    above = sum(value > PAUSE_LIMIT_MS * 1_000 for value in ordered)
    return {"count": len(ordered), **figures, "max_ms": ordered[-1] / 1_000, "above_limit": above}


def measure_all(*, quick: bool) -> dict[str, Any]:
    """Return the figures of every part."""
    largest = {"redis": 4, "sqlite": 4} if quick else {"redis": 7, "sqlite": 6}
    sizes = {store: [10**power for power in range(3, most + 1)] for store, most in largest.items()}
    return {
        "machine": machine.describe(),
        "sizes": measure_sizes(sizes, *((2, 50) if quick else (20, 150))),
        "memory": measure_memory(20_000 if quick else 1_000_000),
        "reclaim": asyncio.run(measure_reclaim(*((20_000, 1.0) if quick else (1_000_000, 45.0)))),
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the tables for the documentation."""
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
    header = ["SQLite", "count", "p50 ms", "p99 ms", "p99.9 ms", "max ms", f"above {PAUSE_LIMIT_MS} ms"]
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
    """Publish the figures."""
    chosen = publishing.options(__doc__)
    try:
        results = publishing.earlier(chosen) or measure_all(quick=chosen.quick)
    except CannotMeasure as error:
        sys.exit(f"scale: {error}")
    publishing.publish("scale", results, markdown(results), chosen)


if __name__ == "__main__":
    main()
