"""Measures the service and its no-op on several versions of grpcio, beside each other, to choose the one to lock.

Each version is installed into a folder of its own that goes before what is installed, so that everything else is the
same. The servers run at the same time, and are measured in interleaved rounds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks import load, machine
from benchmarks.report import table, update_docs, with_range
from benchmarks.results import Results
from benchmarks.rounds import Extent, Rounds, say
from benchmarks.servers import CannotMeasure, Redis, Subject, running_redis

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = "1.75.1,1.80.0,1.85.1"


def install(version: str, folder: Path) -> str:
    """Install one version of grpcio alone into a folder of its own, and return its path."""
    say(f"installing grpcio {version}")
    target = folder / f"grpcio-{version}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    ended = subprocess.run([*pip, "--target", str(target), f"grpcio=={version}"], check=False)
    if ended.returncode:
        raise CannotMeasure(f"grpcio {version} cannot be installed")
    return str(target)


def subjects(version: str, path: str, redis: Redis) -> list[Subject]:
    """Return the no-op and the service on one version."""
    engine = f"grpcio {version}"
    noop = ("-m", "benchmarks.noop_server")
    serve = ("-m", "dedup_service", "serve", "--log-level", "warning", "--store-url", redis.tcp_url)
    return [
        Subject(f"no-op, {engine}", engine, "none", ("noop",), noop, python_path=path),
        Subject(f"service, {engine}", engine, "redis-tcp", ("hot",), serve, python_path=path),
    ]


def measure(versions: list[str], extent: Extent) -> Results:
    """Measure every version; raise CannotMeasure."""
    results = Results(machine.describe(), {"versions": versions})
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as name, ExitStack() as stack:
        folder = Path(name)
        redis = stack.enter_context(running_redis(folder))
        started = [each for version in versions for each in subjects(version, install(version, folder), redis)]
        rounds = Rounds(extent, results, load.H2load(folder), None)
        rounds.measure(rounds.start(started, folder, stack))
    return results


def compare(results: Results, versions: list[str]) -> str:
    """Return the table: calls and CPU of each version, and as a multiple of the first version in the same round."""
    rows = []
    for cell in results.cells:
        kind, _, version = cell.server.partition(", grpcio ")
        first = results.cell(f"{kind}, grpcio {versions[0]}", cell.workload, cell.concurrency)
        assert first is not None  # noqa: S101 - cells of one run
        row = [f"{kind}, grpcio {version}", f"{cell.concurrency}"]
        for figure in ("throughput", "cpu_us"):
            row += [with_range(cell.spread(figure)), with_range(cell.ratio(first, figure))]
        rows.append(row)
    beside = f"of {versions[0]}"
    return table(["server", "callers", "calls a second", beside, "CPU µs a call", beside], rows)


def main() -> None:
    """Measure, and print the table or the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--versions", default=VERSIONS, help="the first is the base (default: %(default)s)")
    parser.add_argument("--concurrency", default="16,64", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--from-json", type=Path, metavar="PATH", help="measure nothing, report these results anew")
    parser.add_argument("--update-docs", action="store_true", help="write the table into docs/performance.md as well")
    options = parser.parse_args()
    versions = options.versions.split(",")
    callers = tuple(map(int, options.concurrency.split(",")))
    try:
        if options.from_json:
            results = Results.from_json(json.loads(options.from_json.read_text()))
            versions = results.settings["versions"]
        else:
            results = measure(versions, Extent(callers, options.rounds, options.seconds, races=20))
    except CannotMeasure as error:
        sys.exit(f"bench: {error}")
    if options.update_docs:
        update_docs(ROOT / "docs" / "performance.md", {"grpcio-versions": compare(results, versions)})
    sys.stdout.write(json.dumps(results.to_json()) + "\n" if options.json else compare(results, versions))
    sys.exit(1 if list(results.bad_answers()) else 0)


if __name__ == "__main__":
    main()
