"""Measures the effect of a second worker, and the cost of metrics with one and two workers.

Services with one and two workers, with and without metrics, share one Redis. Rounds are interleaved, paired with one
worker without metrics. h2load claims one hot id over eight connections, which the kernel distributes over workers.
Linux only.
"""

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import machine, publishing
from benchmarks.load import CLAIM_PATH, H2load, claimed
from benchmarks.publishing import number, say, table, with_range
from benchmarks.results import paired_ratios, spread
from benchmarks.servers import CannotMeasure, Server, Subject, running_redis

CALLERS = 64
KINDS = {
    "1 worker": (),
    "1 worker, metrics": ("--metrics-listen", "127.0.0.1:0"),
    "2 workers": ("--workers", "2"),
    "2 workers, metrics": ("--workers", "2", "--metrics-listen", "127.0.0.1:0"),
}
BASE = "1 worker"
ENGINES = ("grpcio", "native")


def measure(engines: tuple[str, ...], rounds: int, seconds: float) -> dict[str, Any]:
    """Return calls per second and CPU µs per call, of every engine and kind, by round."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {
        engine: {kind: {"rate": [], "cpu_us": []} for kind in KINDS} for engine in engines
    }
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as name, ExitStack() as stack:
        folder = Path(name)
        redis, h2load = stack.enter_context(running_redis(folder)), H2load(folder)
        servers = []
        for engine in engines:
            for kind, more in KINDS.items():
                serve = ("-m", "dedup_service", "serve", "--engine", engine, "--log-level", "warning")
                arguments = (*serve, "--store-url", redis.tcp_url, *more)
                server = Server(Subject(f"{engine} {kind}", engine, "redis", ("hot",), arguments), folder)
                server.start()
                stack.callback(server.stop)
                servers.append((server, found[engine][kind]))
        for done in range(rounds):
            for number_, (server, figures) in enumerate(servers):
                with claimed(server.target, f"hot-{number_}-{done}", retry=False) as constant:
                    before = server.cpu_s
                    load = h2load.run(server.target, CLAIM_PATH, constant, concurrency=CALLERS, seconds=seconds)
                    calls = len(load.latencies_us)
                    if load.wrong or load.failed:
                        raise CannotMeasure(f"{server.subject.name} answered wrongly: {load.first_bad}")
                    figures["rate"].append(calls / load.seconds)
                    figures["cpu_us"].append((server.cpu_s - before) / calls * 1e6)
            say(f"round {done + 1} of {rounds}")
    return {"machine": machine.describe(), "callers": CALLERS, "engines": found}


def markdown(results: dict[str, Any]) -> str:
    """Return the table for the documentation."""
    rows = []
    for engine, kinds in results["engines"].items():
        base = kinds[BASE]
        for kind, figures in kinds.items():
            rate, cpu = figures["rate"], figures["cpu_us"]
            of_base = (with_range(paired_ratios(rate, base["rate"])), with_range(paired_ratios(cpu, base["cpu_us"])))
            rows.append(
                (f"{engine}, {kind}", number(spread(rate).median), of_base[0], number(spread(cpu).median), of_base[1])
            )
    return table(("service", "claims a second", f"of {BASE}", "CPU µs a claim", f"of {BASE}"), rows)


def main() -> None:
    """Publish the figures."""
    chosen = publishing.options(__doc__)
    try:
        results = publishing.earlier(chosen) or measure(ENGINES, 1 if chosen.quick else 12, 0.3 if chosen.quick else 1)
    except CannotMeasure as error:
        sys.exit(f"workers: {error}")
    publishing.publish("workers", results, markdown(results), chosen)


if __name__ == "__main__":
    main()
