"""Measures the service, a no-op rpc, a naive implementation and Redis directly, in interleaved rounds.

Each round runs all workloads, servers and concurrencies, so the machine's changing speed affects all of them. Figures
are paired with the no-op of the same engine, concurrency, load generator and round. Linux only. Progress goes to
standard error; the output is a JSON file, a Markdown page and plots.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks import load, machine, report
from benchmarks.publishing import ROOT, update_docs
from benchmarks.results import Results
from benchmarks.rounds import STORES, Extent, Rounds, all_subjects, say
from benchmarks.servers import CannotMeasure, running_redis

_QUICK = {"concurrency": (1, 16), "rounds": 1, "seconds": 0.4, "races": 20, "starts": 1}
_FULL = {"concurrency": (1, 16, 64, 256), "rounds": 5, "seconds": 0.7, "races": 200, "starts": 3}


def measure(options: argparse.Namespace) -> Results:
    """Measure according to the options. Raises CannotMeasure."""
    extent = Extent(options.concurrency, options.rounds, options.seconds, options.races, options.starts)
    results = Results(machine.describe(), asdict(extent) | {"workers": options.workers})
    engines = [engine for engine in options.engines if _available(engine, results)]
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as name, ExitStack() as stack:
        folder = Path(name)
        redis = stack.enter_context(running_redis(folder))
        loadgen = load.build_loadgen(folder)
        if loadgen is None:
            results.skipped.append(
                "claims of fresh ids and batches: go is not on PATH, and their load generator needs it"
            )
        rounds = Rounds(extent, results, load.H2load(folder), loadgen)
        subjects = all_subjects(
            engines, options.stores, workers=options.workers, redis=redis, folder=folder, naive=options.naive
        )
        rounds.measure(rounds.start(subjects, folder, stack), redis)
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
    parser.add_argument(
        "--quick", action="store_true", help="short run of about a minute, whose figures are meaningless"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the JSON to this file")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "benchmarks", help="output folder (default: %(default)s)"
    )
    parser.add_argument(
        "--engines", type=_listed, default=["grpcio", "native"], metavar="NAME,…", help="(default: both)"
    )
    parser.add_argument("--stores", type=_listed, default=list(STORES), metavar="NAME,…", help="(default: all)")
    parser.add_argument("--no-naive", dest="naive", action="store_false", help="skip the naive implementation")
    parser.add_argument(
        "--concurrency", type=lambda text: tuple(map(int, _listed(text))), metavar="N,…", help="numbers of callers"
    )
    parser.add_argument("--rounds", type=int, help="number of rounds")
    parser.add_argument("--seconds", type=float, help="duration of each measurement")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the service (default: %(default)s)")
    parser.add_argument("--from-json", type=Path, metavar="PATH", help="report these results instead of measuring")
    parser.add_argument("--update-docs", action="store_true", help="also write the tables to docs/performance.md")
    options = parser.parse_args()
    for name, value in (_QUICK if options.quick else _FULL).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return options


def main() -> None:
    """Write the report; exit with 1 for a wrong answer."""
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
        update_docs(ROOT / "docs" / "performance.md", report.page_sections(results))
    bad = list(results.bad_answers())
    for line in bad:
        say(line)
    say(f"{options.out}/report.md")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
