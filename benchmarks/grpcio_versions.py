"""Measures the service and the no-op server on several versions of grpcio, to choose one.

Each version precedes the installed packages from its own folder; all else is equal. The servers run at the same time,
in interleaved rounds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks import load, machine
from benchmarks.publishing import STUDIES, table, update_docs, with_range
from benchmarks.results import Results
from benchmarks.rounds import Extent, Rounds, say
from benchmarks.servers import CannotMeasure, Redis, Subject, running_redis

VERSIONS = "1.75.1,1.80.0,1.85.1"


def install(version: str, folder: Path) -> str:
    """Install a version of grpcio, without dependencies, into its own folder; return the path."""
    say(f"installing grpcio {version}")
    target = folder / f"grpcio-{version}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    ended = subprocess.run([*pip, "--target", str(target), f"grpcio=={version}"], check=False)
    if ended.returncode:
        raise CannotMeasure(f"grpcio {version} cannot be installed: see the output of pip above")
    return str(target)


def subjects(version: str, path: str, redis: Redis) -> list[Subject]:
    """Return the no-op server and the service on one version."""
    engine = f"grpcio {version}"
    noop = ("-m", "benchmarks.noop_server")
    serve = ("-m", "dedup_service", "serve", "--log-level", "warning", "--store-url", redis.tcp_url)
    return [
        Subject(f"no-op, {engine}", engine, "none", ("noop",), noop, python_path=path),
        Subject(f"service, {engine}", engine, "redis-tcp", ("hot",), serve, python_path=path),
    ]


def measure(versions: list[str], extent: Extent) -> Results:
    """Measure every version. Raises CannotMeasure."""
    results = Results(machine.describe(), {"versions": versions})
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as name, ExitStack() as stack:
        folder = Path(name)
        redis = stack.enter_context(running_redis(folder))
        started = [each for version in versions for each in subjects(version, install(version, folder), redis)]
        rounds = Rounds(extent, results, load.H2load(folder), None)
        rounds.measure(rounds.start(started, folder, stack))
    return results


def compare(results: Results, versions: list[str]) -> str:
    """Return the table: throughput and CPU of each version, and their ratio to the first by round."""
    rows = []
    for cell in results.cells:
        kind, _, version = cell.server.partition(", grpcio ")
        first = results.cell(f"{kind}, grpcio {versions[0]}", cell.workload, cell.concurrency)
        assert first is not None  # noqa: S101 - cells of one run
        row = [f"{kind}, grpcio {version}", f"{cell.concurrency}"]
        for figure in ("throughput", "cpu_us"):
            row += [with_range(cell.spread(figure)), with_range(cell.ratio(first, figure))]
        rows.append(row)
    ratio = f"of {versions[0]}"
    return table(["server", "callers", "calls a second", ratio, "CPU µs a call", ratio], rows)


def main() -> None:
    """Print the table or the JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--versions", default=VERSIONS, help="comma-separated; the first is the base (default: %(default)s)"
    )
    parser.add_argument("--concurrency", default="16,64", help="numbers of callers (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="duration of each measurement (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--from-json", type=Path, metavar="PATH", help="report these results instead of measuring")
    parser.add_argument(
        "--update-docs", action="store_true", help="also write the table to benchmarks/results/studies.md"
    )
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
        update_docs(STUDIES, {"grpcio-versions": compare(results, versions)})
    sys.stdout.write(json.dumps(results.to_json()) + "\n" if options.json else compare(results, versions))
    sys.exit(1 if list(results.bad_answers()) else 0)


if __name__ == "__main__":
    main()
