"""Plans and executes a run: starts servers, checks answers, measures in interleaved rounds."""

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load
from benchmarks.results import Cell, Load, Results, Round, ServerFigures
from benchmarks.servers import Redis, Server, Subject

# redis-py without a service, as a server in the report.
DIRECT = "Redis directly"
# The base of the comparison with Redis.
DIRECT_CLIENT = "redis-py asyncio"
STORES = ("redis-tcp", "redis-unix", "sqlite")
NAIVE = ("setnx", "get-then-set")
# With more callers, the figures would show the queue of thousands of claims.
BATCH_CALLERS = 16

# Workloads of h2load, which repeats one body, and of loadgen, with fresh ids.
CONSTANT = ("noop", "hot", "retry")
FRESH = ("noop", "fresh", "batch")
WORKLOADS = {
    "noop": "no-op rpc",
    "hot": "claims of one hot id",
    "retry": "retries with one token",
    "fresh": "claims of fresh ids",
    "batch": "batches of 100 fresh ids",
    "set": "SET NX of fresh ids",
}

_WARM_UP_S = 0.3
_WARM_UP_CALLERS = 16
_REDIS_BENCHMARK_CALLS = 20_000


def store_url(store: str, redis: Redis, folder: Path, engine: str) -> str:
    """Return a store's URL by its name in the report."""
    urls = {"redis-tcp": redis.tcp_url, "redis-unix": redis.unix_url, "sqlite": f"sqlite://{folder}/{engine}.db"}
    return urls[store]


def all_subjects(
    engines: list[str], stores: list[str], *, workers: int, redis: Redis, folder: Path, naive: bool
) -> list[Subject]:
    """Return all servers of a run, no-op servers before their paired services."""
    found = []
    for engine in engines:
        noop = ["-m", "benchmarks.noop_server", "--engine", engine]
        if workers > 1:
            noop += ["--reuse-port"]
        found.append(Subject(f"no-op, {engine}", engine, "none", ("noop",), tuple(noop), processes=workers))
        for store in stores:
            serve = ["-m", "dedup_service", "serve", "--engine", engine, "--log-level", "warning"]
            serve += ["--store-url", store_url(store, redis, folder, engine)]
            if workers > 1:
                serve += ["--workers", str(workers)]
            workloads = ("hot", "retry", "fresh", "batch")
            found.append(Subject(f"service, {engine}, {store}", engine, store, workloads, tuple(serve)))
    if naive:
        for variant in NAIVE:
            peer = ("-m", "benchmarks.naive_peer", "--variant", variant, "--redis", redis.tcp_url)
            found.append(Subject(f"naive peer, {variant}", "grpcio", "redis-tcp", ("hot", "fresh"), peer))
    return found


@dataclass(frozen=True)
class Extent:
    """The extent of a run.

    `seconds` is the duration of each measurement, `races` the number of ids claimed by 16 concurrent callers, and
    `starts` the starts of each server.
    """

    concurrency: tuple[int, ...]
    rounds: int
    seconds: float
    races: int
    starts: int = 1


class Rounds:
    """Measures into `results`. Methods may raise CannotMeasure."""

    def __init__(self, extent: Extent, results: Results, h2load: load.H2load, loadgen: load.Loadgen | None) -> None:
        self._extent = extent
        self._results = results
        self._h2load = h2load
        self._loadgen = loadgen
        self._count = 0

    def start(self, subjects: Sequence[Subject], folder: Path, stack: ExitStack) -> list[Server]:
        """Start every server `starts` times; return the last ones, checked and warmed up."""
        servers = []
        for subject in subjects:
            figures = ServerFigures(subject.name)
            self._results.servers.append(figures)
            server = Server(subject, folder)
            stack.callback(server.stop)
            for number in range(self._extent.starts):
                server.stop()
                say(f"starting {subject.name}, {number + 1} of {self._extent.starts}")
                figures.start_ms.append(round(server.start(), 1))
            servers.append(server)
            if subject.store != "none":
                figures.claims_checked = self._extent.races
                figures.double_claims = asyncio.run(load.double_claims(server.target, self._id(), self._extent.races))
            for workload in subject.workloads:
                for loader in self._loaders(workload):
                    self._load(server, workload, loader, _WARM_UP_CALLERS, _WARM_UP_S)
        return servers

    def measure(self, servers: Sequence[Server], direct: Redis | None = None) -> None:
        """Measure every server, and Redis directly if given, in rounds; then peak memory."""
        cells = {key: Cell(*key, base=base) for key, base in self._keys(servers, direct)}
        self._results.cells += cells.values()
        by_name = {server.subject.name: server for server in servers}
        steps = self._extent.rounds * len(cells)
        begun = time.monotonic()
        for number in range(self._extent.rounds):
            for done, ((name, workload, loader, callers), cell) in enumerate(cells.items(), number * len(cells)):
                left = (time.monotonic() - begun) / done * (steps - done) if done else 0
                say(f"{done + 1} of {steps}, {left:.0f} s left: {name}, {workload}, {callers} callers")
                if name in by_name:
                    cell.rounds.append(self._paired(by_name[name], workload, loader, callers))
                elif direct is not None:
                    cell.rounds.append(self._direct(direct, loader, callers))
            if direct is not None:
                self._measure_redis(direct)
        for server, figures in zip(servers, self._results.servers, strict=True):
            figures.peak_kib = server.peak_kib

    def _keys(self, servers: Sequence[Server], direct: Redis | None) -> Iterator[tuple[tuple[str, str, str, int], str]]:
        for callers in self._extent.concurrency:
            for server in servers:
                for workload in server.subject.workloads:
                    for loader in self._loaders(workload):
                        if workload != "batch" or callers <= BATCH_CALLERS:
                            yield (server.subject.name, workload, loader, callers), server.subject.base
            if direct is not None and callers == 1:
                yield (DIRECT, "set", "redis-py sync", callers), ""
            if direct is not None:
                yield (DIRECT, "set", DIRECT_CLIENT, callers), ""

    def _loaders(self, workload: str) -> Iterator[str]:
        if workload in CONSTANT:
            yield self._h2load.name
        if workload in FRESH and self._loadgen is not None:
            yield self._loadgen.name

    def _paired(self, server: Server, workload: str, loader: str, callers: int) -> Round:
        before = server.cpu_s
        found = self._load(server, workload, loader, callers, self._extent.seconds)
        if found.first_bad:
            say(f"WRONG: {found.first_bad}")
        claims = load.BATCH if workload == "batch" else 1
        return Round.of(found, cpu_s=server.cpu_s - before, claims_a_call=claims)

    def _load(self, server: Server, workload: str, loader: str, callers: int, seconds: float) -> Load:
        if self._loadgen is not None and loader == self._loadgen.name:
            return self._loadgen.run(server.target, workload, self._id(), concurrency=callers, seconds=seconds)
        if workload == "noop":
            constant = load.noop_answer(self._id())
            return self._h2load.run(server.target, load.NOOP_PATH, constant, concurrency=callers, seconds=seconds)
        with load.claimed(server.target, self._id(), retry=workload == "retry") as constant:
            return self._h2load.run(server.target, load.CLAIM_PATH, constant, concurrency=callers, seconds=seconds)

    def _direct(self, redis: Redis, client: str, callers: int) -> Round:
        kind = client.removeprefix("redis-py ")
        found, cpu_s = load.direct(kind, redis.tcp_url, self._id(), concurrency=callers, seconds=self._extent.seconds)
        return Round.of(found, cpu_s=cpu_s)

    def _measure_redis(self, redis: Redis) -> None:
        for callers in self._extent.concurrency:
            calls = int(_REDIS_BENCHMARK_CALLS * self._extent.seconds)
            rate = load.redis_benchmark(redis.port, concurrency=callers, calls=calls)
            if rate is not None:
                self._results.redis_benchmark.setdefault(str(callers), []).append(rate)

    def _id(self) -> str:
        self._count += 1
        return f"benchmark:{self._count}"


def say(progress: str) -> None:
    """Write progress to standard error."""
    sys.stderr.write(f"bench: {progress}\n")
