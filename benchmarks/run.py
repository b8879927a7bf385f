"""Measures the service beside an rpc that does nothing, a naive peer and Redis itself, in interleaved rounds.

In each round every server gets every workload at every concurrency, one after the other, so that a machine that slows
down slows them all, and each figure is paired with the no-op of the same engine, concurrency, load generator and round.
Linux only. Progress goes to standard error; the figures go to a JSON file, a Markdown page and plots.
"""

import argparse
import asyncio
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import answers, load, machine, plan, report
from benchmarks.results import Cell, Load, Results, Round, ServerFigures
from benchmarks.servers import CannotMeasure, Redis, Server, Subject, running_redis

ROOT = Path(__file__).resolve().parents[1]
_QUICK = {"concurrency": [1, 16], "rounds": 1, "seconds": 0.2, "races": 20}
_FULL = {"concurrency": [1, 16, 64, 256], "rounds": 3, "seconds": 1.0, "races": 200}
_WARM_UP_S = 0.3
_REDIS_BENCHMARK_CALLS = 20_000


class Run:
    """One run over all servers."""

    def __init__(self, options: argparse.Namespace, redis: Redis, folder: Path, results: Results) -> None:
        self._options = options
        self._redis = redis
        self._results = results
        self._h2load = load.H2load(folder)
        self._loadgen = load.build_loadgen(folder)
        self._count = 0
        if self._loadgen is None:
            results.skipped.append("claims of fresh ids and batches: their load generator takes Go, which is missing")

    def start(self, subjects: Sequence[Subject], folder: Path, stack: ExitStack) -> list[Server]:
        """Start every server as often as there are rounds, leave the last running, and see that it answers rightly."""
        servers = []
        for subject in subjects:
            figures = ServerFigures(subject.name)
            self._results.servers.append(figures)
            server = Server(subject, folder)
            for number in range(self._options.rounds):
                if number:
                    server.stop()
                say(f"starting {subject.name}, {number + 1} of {self._options.rounds}")
                figures.start_ms.append(round(server.start(), 1))
                stack.callback(server.stop)
            servers.append(server)
            if subject.store != "none":
                figures.claims_checked = self._options.races
                asked = answers.doubly_claimed(server.target, self._id(), self._options.races)
                figures.double_claims = asyncio.run(asked)
            for workload in subject.workloads:
                for loader in self._loaders(workload):
                    self._load(server, workload, loader, concurrency=16, seconds=_WARM_UP_S)
        return servers

    def measure(self, servers: Sequence[Server]) -> None:
        """Measure everything in rounds."""
        cells = {key: Cell(*key, base=base) for key, base in self._keys(servers)}
        self._results.cells += cells.values()
        by_name = {server.subject.name: server for server in servers}
        steps = self._options.rounds * len(cells)
        begun = time.monotonic()
        for number in range(self._options.rounds):
            for done, ((name, workload, loader, concurrency), cell) in enumerate(cells.items(), number * len(cells)):
                left = (time.monotonic() - begun) / done * (steps - done) if done else 0
                say(f"{done + 1} of {steps}, {left:.0f} s left: {name}, {workload}, {concurrency} callers")
                if name == plan.DIRECT:
                    cell.rounds.append(self._direct(loader, concurrency))
                else:
                    cell.rounds.append(self._paired(by_name[name], workload, loader, concurrency))
            for concurrency in self._options.concurrency:
                how = {"concurrency": concurrency, "calls": int(_REDIS_BENCHMARK_CALLS * self._options.seconds)}
                rate = load.redis_benchmark(self._redis.port, **how)
                if rate is not None:
                    self._results.redis_benchmark.setdefault(str(concurrency), []).append(rate)
        for server, figures in zip(servers, self._results.servers, strict=True):
            figures.peak_kib = server.peak_kib

    def _keys(self, servers: Sequence[Server]) -> Iterator[tuple[tuple[str, str, str, int], str]]:
        for concurrency in self._options.concurrency:
            for server in servers:
                for workload in server.subject.workloads:
                    for loader in self._loaders(workload):
                        if workload != "batch" or concurrency <= plan.BATCH_CALLERS:
                            yield (server.subject.name, workload, loader, concurrency), server.subject.base
            clients = ("redis-py sync", "redis-py asyncio") if concurrency == 1 else ("redis-py asyncio",)
            for client in clients:
                yield (plan.DIRECT, "set", client, concurrency), ""

    def _loaders(self, workload: str) -> Iterator[str]:
        if workload in plan.CONSTANT:
            yield self._h2load.name
        if workload in plan.FRESH and self._loadgen is not None:
            yield self._loadgen.name

    def _paired(self, server: Server, workload: str, loader: str, concurrency: int) -> Round:
        before = server.cpu_s
        found = self._load(server, workload, loader, concurrency=concurrency, seconds=self._options.seconds)
        if found.first_bad:
            say(f"WRONG: {found.first_bad}")
        claims = load.BATCH if workload == "batch" else 1
        return Round.of(found, cpu_s=server.cpu_s - before, claims_a_call=claims)

    def _load(self, server: Server, workload: str, loader: str, *, concurrency: int, seconds: float) -> Load:
        if self._loadgen is not None and loader == self._loadgen.name:
            return self._loadgen.run(server.target, workload, self._id(), concurrency=concurrency, seconds=seconds)
        if workload == "noop":
            message = answers.hot_claim(self._id(), retry=False).SerializeToString()
            return self._h2load.run(
                server.target, answers.NOOP, message, answer_bytes=0, concurrency=concurrency, seconds=seconds
            )
        with answers.constant_answer(server.target, self._id(), retry=workload == "retry") as constant:
            return self._h2load.run(
                server.target,
                answers.CLAIM,
                constant.message,
                answer_bytes=constant.answer_bytes,
                concurrency=concurrency,
                seconds=seconds,
            )

    def _direct(self, client: str, concurrency: int) -> Round:
        kind = client.removeprefix("redis-py ")
        how = {"concurrency": concurrency, "seconds": self._options.seconds}
        found, cpu_s = load.direct(kind, self._redis.tcp_url, self._id(), **how)
        return Round.of(found, cpu_s=cpu_s)

    def _id(self) -> str:
        self._count += 1
        return f"benchmark:{self._count}"


def say(progress: str) -> None:
    """Report progress."""
    sys.stderr.write(f"bench: {progress}\n")


def measure(options: argparse.Namespace) -> Results:
    """Measure what the options ask for; raise CannotMeasure."""
    settings = {name: getattr(options, name) for name in ("concurrency", "rounds", "seconds", "workers")}
    results = Results(machine.describe(), settings)
    engines = [engine for engine in options.engines if _available(engine, results)]
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as name, ExitStack() as stack:
        folder = Path(name)
        redis = stack.enter_context(running_redis(folder))
        run = Run(options, redis, folder, results)
        subjects = plan.subjects(
            engines, options.stores, workers=options.workers, redis=redis, folder=folder, naive=options.naive
        )
        run.measure(run.start(subjects, folder, stack))
    return results


def _available(engine: str, results: Results) -> bool:
    if engine == "native" and importlib.util.find_spec("pygrpc_native") is None:
        results.skipped.append("the engine native: pygrpc-native is not installed")
        return False
    return True


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="see in a minute that everything runs: no figures to keep")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the JSON file here")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks", help="folder (default: %(default)s)")
    parser.add_argument("--engines", type=_listed, default=["grpcio", "native"], metavar="NAME,…")
    parser.add_argument("--stores", type=_listed, default=list(plan.STORES), metavar="NAME,…")
    parser.add_argument("--no-naive", dest="naive", action="store_false", help="leave the naive peers out")
    parser.add_argument("--concurrency", type=lambda text: [int(part) for part in _listed(text)], metavar="N,…")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument("--workers", type=int, default=1, help="processes of the service (default: %(default)s)")
    parser.add_argument("--from-json", type=Path, metavar="PATH", help="measure nothing, report these results anew")
    parser.add_argument("--update-docs", action="store_true", help="write the tables into docs/performance.md as well")
    options = parser.parse_args()
    for name, value in (_QUICK if options.quick else _FULL).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    """Measure, write the report, and end with 1 when an answer was wrong."""
    options = _options()
    try:
        if options.from_json:
            results = Results.from_json(json.loads(options.from_json.read_text()))
        else:
            results = measure(options)
    except CannotMeasure as error:
        sys.exit(f"bench: {error}")
    report.write(results, options.out, options.json)
    if options.update_docs:
        report.update_docs(ROOT / "docs" / "performance.md", report.sections(results))
    bad = list(results.bad_answers())
    for line in bad:
        say(line)
    say(f"{options.out}/report.md")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
