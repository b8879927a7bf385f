"""The order of a run: start every server, see that it answers rightly, and measure all in interleaved rounds."""

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import answers, load, plan
from benchmarks.results import Cell, Load, Results, Round, ServerFigures
from benchmarks.servers import Redis, Server, Subject

_WARM_UP_S = 0.3
_WARM_UP_CALLERS = 16
_REDIS_BENCHMARK_CALLS = 20_000


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    `seconds` for each workload, `races` for ids that 16 callers claim at once, and `starts` of each server.
    """

    concurrency: tuple[int, ...]
    rounds: int
    seconds: float
    races: int
    starts: int = 1


class Rounds:
    """All measurements of one run, gathered in its results. Everything it does may raise CannotMeasure."""

    def __init__(self, extent: Extent, results: Results, h2load: load.H2load, loadgen: load.Loadgen | None) -> None:
        self._extent = extent
        self._results = results
        self._h2load = h2load
        self._loadgen = loadgen
        self._count = 0

    def start(self, subjects: Sequence[Subject], folder: Path, stack: ExitStack) -> list[Server]:
        """Start every server as often as was asked for, and leave the last start running, checked and warm."""
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
                asked = answers.doubly_claimed(server.target, self._id(), self._extent.races)
                figures.double_claims = asyncio.run(asked)
            for workload in subject.workloads:
                for loader in self._loaders(workload):
                    self._load(server, workload, loader, _WARM_UP_CALLERS, _WARM_UP_S)
        return servers

    def measure(self, servers: Sequence[Server], direct: Redis | None = None) -> None:
        """Measure everything in rounds, also Redis itself where it is given, and then read the peaks of memory."""
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
                        if workload != "batch" or callers <= plan.BATCH_CALLERS:
                            yield (server.subject.name, workload, loader, callers), server.subject.base
            if direct is not None and callers == 1:
                yield (plan.DIRECT, "set", "redis-py sync", callers), ""
            if direct is not None:
                yield (plan.DIRECT, "set", plan.DIRECT_CLIENT, callers), ""

    def _loaders(self, workload: str) -> Iterator[str]:
        if workload in plan.CONSTANT:
            yield self._h2load.name
        if workload in plan.FRESH and self._loadgen is not None:
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
            constant = answers.noop(self._id())
            return self._h2load.run(server.target, answers.NOOP, constant, concurrency=callers, seconds=seconds)
        with answers.claimed(server.target, self._id(), retry=workload == "retry") as constant:
            return self._h2load.run(server.target, answers.CLAIM, constant, concurrency=callers, seconds=seconds)

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
    """Report progress."""
    sys.stderr.write(f"bench: {progress}\n")
