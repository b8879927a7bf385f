"""Runs the history check: `python -m tests.stress.chaos.run --seconds 180 --seed 1`.

The seed decides the requests of the clients, the order of the faults and the first deployment. It does not decide how
processes interleave, so a run is not repeatable call by call. The history is kept if there are findings.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from tests.stress.chaos.check import check
from tests.stress.chaos.client import ClientConfig
from tests.stress.chaos.deployments import DEPLOYMENTS
from tests.stress.chaos.fleet import Fleet
from tests.stress.chaos.history import read, to_line
from tests.stress.chaos.mutants import MUTATIONS
from tests.stress.chaos.nemesis import Nemesis
from tests.stress.chaos.report import Report, count, errors_of

WORKERS = 6
_PROGRESS_S = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run. `mutation` is a protection to remove, or empty; `faults` None means all."""

    seconds: float
    seed: int
    deployment: str = "redis"
    servers: int = 2
    clients: int = 3
    mutation: str = ""
    faults: Sequence[str] | None = None


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
        verdict = check(calls)
        report = Report(
            plan.deployment,
            plan.seed,
            count(calls, verdict),
            errors_of(calls),
            faults,
            verdict.findings,
            str(folder),
        )
        return report
    finally:
        if report is None or not report.findings:
            shutil.rmtree(folder)


async def _record(folder: Path, plan: Plan) -> dict[str, int]:
    """Write the histories into the folder, and return how often each fault happened."""
    rng = random.Random(f"{plan.seed}-{plan.deployment}")
    async with Fleet(folder, plan.deployment, plan.servers, plan.mutation, rng) as fleet:
        kinds = list(fleet.faults) if plan.faults is None else plan.faults
        nemesis = Nemesis(fleet, kinds, rng)
        until_ns = time.monotonic_ns() + int(plan.seconds * 1e9)
        for number in range(plan.clients):
            name = f"client{number}"
            history = str(folder / f"{name}.jsonl")
            fleet.start_client(ClientConfig(name, plan.seed, fleet.targets, history, WORKERS))
        progress = asyncio.create_task(_report_progress(plan.deployment, nemesis, until_ns))
        await nemesis.run(until_ns)
        await fleet.stop_clients()
        await fleet.store.settle()
        progress.cancel()
        (folder / "failovers.jsonl").write_text("".join(map(to_line, fleet.store.failovers)))
        return {kind: nemesis.injected[kind] for kind in kinds}


async def _report_progress(deployment: str, nemesis: Nemesis, until_ns: int) -> None:
    while True:
        left_s = max(0, until_ns - time.monotonic_ns()) / 1e9
        sys.stderr.write(f"{deployment}: {left_s:4.0f} s left, {nemesis.injected.total()} faults\n")
        await asyncio.sleep(_PROGRESS_S)


def rotation(seconds: float, seed: int) -> list[tuple[str, float]]:
    """Return the deployments that fit into the time, beginning with one the seed chooses, and the time of each."""
    names = list(DEPLOYMENTS)
    first = seed % len(names)
    fitting: list[tuple[str, int]] = []
    used_s = 0
    for name in names[first:] + names[:first]:
        round_s = DEPLOYMENTS[name].round_s
        if fitting and used_s + round_s > seconds:
            break
        fitting.append((name, round_s))
        used_s += round_s
    return [(name, seconds * round_s / used_s) for name, round_s in fitting]


def main(
    *,
    seconds: Annotated[
        float, typer.Option(help="How long the clients call; longer if some fault has not happened yet.")
    ] = 180,
    seed: Annotated[int | None, typer.Option(help="Decides calls and faults.  [default: random]")] = None,
    deployment: Annotated[
        str, typer.Option(help=f"Run only one: {', '.join(DEPLOYMENTS)}.  [default: as many as fit, in turn]")
    ] = "",
    servers: Annotated[int, typer.Option(min=1, help="Servers, which use the engines in turn.")] = 2,
    clients: Annotated[int, typer.Option(min=1, help="Client processes with six callers each.")] = 3,
    mutation: Annotated[str, typer.Option(help=f"Remove a protection: {', '.join(MUTATIONS)}.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as a JSON array.")] = False,
) -> None:
    """Check the promises of a claim under faults. The exit code is 0 if they held and every kind of event happened."""
    if mutation and mutation not in MUTATIONS:
        raise typer.BadParameter(f"unknown mutation {mutation!r}: choose one of {', '.join(MUTATIONS)}")
    if deployment and deployment not in DEPLOYMENTS:
        raise typer.BadParameter(f"unknown deployment {deployment!r}: choose one of {', '.join(DEPLOYMENTS)}")
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    sys.stderr.write(f"seed {seed}\n")
    turns = [(deployment, seconds)] if deployment else rotation(seconds, seed)
    common = Plan(seconds=seconds, seed=seed, servers=servers, clients=clients, mutation=mutation)
    reports = [run(replace(common, deployment=name, seconds=its_seconds)) for name, its_seconds in turns]
    objects = [report.as_json() for report in reports]
    sys.stdout.write((json.dumps(objects, indent=2) if as_json else "\n\n".join(map(str, reports))) + "\n")
    if any(report.findings or report.not_shown for report in reports):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
