"""Runs the history check: `python -m tests.stress.chaos.run --seconds 180 --seed 1`.

The seed decides the requests of the clients and the order of the faults. It does not decide how processes interleave,
so a run is not repeatable call by call. The history is kept if there are findings.
"""

import asyncio
import json
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tests.stress.chaos.check import check
from tests.stress.chaos.client import ClientConfig
from tests.stress.chaos.cluster import Cluster
from tests.stress.chaos.history import read
from tests.stress.chaos.mutants import MUTATIONS
from tests.stress.chaos.nemesis import FAULTS, Nemesis
from tests.stress.chaos.proxy import PROXY_FAULTS
from tests.stress.chaos.report import Report, count, errors_of

WORKERS = 6
_PROGRESS_S = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run. `mutation` is a protection to remove, or empty."""

    seconds: float
    seed: int
    servers: int = 3
    clients: int = 3
    mutation: str = ""
    faults: Sequence[str] = FAULTS


def run(plan: Plan) -> Report:
    """Run clients against servers under faults, check their histories and return the report.

    Ends every process it starts. Keeps the folder of the histories if there are findings.
    """
    # Keep the path short: a Unix socket path has a limit of about 100 bytes.
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    report: Report | None = None
    try:
        faults = asyncio.run(_record(folder, plan))
        calls = list(read(sorted(folder.glob("*.jsonl"))))
        report = Report(plan.seed, count(calls), errors_of(calls), faults, check(calls), str(folder))
        return report
    finally:
        if report is None or not report.findings:
            shutil.rmtree(folder)


async def _record(folder: Path, plan: Plan) -> dict[str, int]:
    """Write the histories into the folder, and return how often each fault happened."""
    async with Cluster(folder, plan.servers, plan.mutation, random.Random(f"{plan.seed}-proxy")) as cluster:
        nemesis = Nemesis(cluster, plan.faults, random.Random(f"{plan.seed}-nemesis"))
        until_ns = time.monotonic_ns() + int(plan.seconds * 1e9)
        for number in range(plan.clients):
            name = f"client{number}"
            history = str(folder / f"{name}.jsonl")
            cluster.start_client(ClientConfig(name, plan.seed, cluster.targets, history, WORKERS))
        progress = asyncio.create_task(_report_progress(nemesis, until_ns))
        await nemesis.run(until_ns)
        await cluster.stop_clients()
        progress.cancel()
        # A proxy fault counts only if it met traffic.
        return {
            kind: (cluster.proxy.struck if kind in PROXY_FAULTS else nemesis.injected)[kind] for kind in plan.faults
        }


async def _report_progress(nemesis: Nemesis, until_ns: int) -> None:
    while (left_s := (until_ns - time.monotonic_ns()) / 1e9) > 0:
        sys.stderr.write(f"{left_s:4.0f} s left, {nemesis.injected.total()} faults\n")
        await asyncio.sleep(_PROGRESS_S)


def main(
    *,
    seconds: Annotated[
        float, typer.Option(help="How long the clients call; longer if some fault has not happened yet.")
    ] = 180,
    seed: Annotated[int | None, typer.Option(help="Decides calls and faults.  [default: random]")] = None,
    servers: Annotated[int, typer.Option(min=1)] = 3,
    clients: Annotated[int, typer.Option(min=1, help="Client processes with six callers each.")] = 3,
    mutation: Annotated[str, typer.Option(help=f"Remove a protection: {', '.join(MUTATIONS)}.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check the promises of a claim under faults. The exit code is 0 if they held and every kind of event happened."""
    if mutation and mutation not in MUTATIONS:
        raise typer.BadParameter(f"unknown mutation {mutation!r}: choose one of {', '.join(MUTATIONS)}")
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    sys.stderr.write(f"seed {seed}\n")
    report = run(Plan(seconds=seconds, seed=seed, servers=servers, clients=clients, mutation=mutation))
    sys.stdout.write((json.dumps(report.as_json(), indent=2) if as_json else str(report)) + "\n")
    if report.findings or report.not_shown:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
