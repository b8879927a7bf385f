"""Fuzzes every target: `python -m tests.stress.fuzz.run --seconds 60 --seed 1`.

Targets run one after the other, each in its own process. libFuzzer starts from the inputs in `corpus/` and mutates
them. A search is repeatable with the same seed, corpus and --runs, but not with --seconds.
"""

import asyncio
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tests.stress.fuzz.mutants import MUTATIONS
from tests.stress.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
FOUND = Path("build/fuzz")
MAX_INPUT_BYTES = 4_096
# Limits for one input: generous, for loaded machines.
_INPUT_TIMEOUT_S = 20
_INPUT_MEMORY_MIB = 1_024
_PROGRESS_S = 5
_START_AND_END_S = 60
_KEPT_LINES = 30

_STATUS = re.compile(r"#(?P<runs>\d+)\s+\w+.*?cov: (?P<edges>\d+)")
_DONE = re.compile(r"Done (?P<runs>\d+) runs")
_NOISE = re.compile(r"INFO|WARNING|MS: |0x|Base64|\\\\|$")
_SAVED = re.compile(r"Test unit written to (?P<path>.+)")


@dataclass
class Search:
    """The result of fuzzing one target."""

    target: str
    runs: int = 0
    """Number of inputs."""
    edges: int = 0
    """Number of branches reached."""
    seconds: float = 0.0
    found: str | None = None
    """File of the input that broke a promise."""
    error: str = ""
    """The last output of a process that found something or failed."""

    def __str__(self) -> str:
        summary = f"{self.target:>13}: {self.runs:9,} inputs in {self.seconds:4.0f} s, {self.edges:4} branches reached"
        if not self.error:
            return f"{summary}; nothing found"
        replay = f'make fuzz ARGS="--replay {self.found}"' if self.found else "no input was saved"
        return f"{summary}; FOUND\n\n{self.error}\n\nreplay: {replay}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run. `mutation` is a protection to remove, or empty."""

    seconds: float
    seed: int
    runs: int = -1
    targets: tuple[str, ...] = tuple(TARGETS)
    mutation: str = ""
    found: Path = field(default=FOUND)


async def search(plan: Plan, target: str) -> Search:
    """Fuzz one target until the time or number of runs is up or an input is found; return the result."""
    result = Search(target)
    begun = time.monotonic()
    saved = plan.found / target
    saved.mkdir(parents=True, exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DEDUP_")}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, tempfile.TemporaryDirectory(prefix="fuzz-") as grown:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.stress.fuzz.one", target, plan.mutation),
            *(f"-seed={plan.seed}", f"-max_total_time={max(1, round(plan.seconds))}", f"-runs={plan.runs}"),
            *(f"-max_len={MAX_INPUT_BYTES}", f"-timeout={_INPUT_TIMEOUT_S}", f"-rss_limit_mb={_INPUT_MEMORY_MIB}"),
            *(f"-artifact_prefix={saved}/", grown, str(CORPUS / target)),
            # The iteration order of sets must not vary, or the search would.
            env=clean | {"PYTHONHASHSEED": "0", "TMPDIR": folder},
            # atheris writes exceptions to one, libFuzzer everything else to the other.
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        progress = asyncio.create_task(_report_progress(result, begun, plan.seconds))
        try:
            async with asyncio.timeout(plan.seconds + _INPUT_TIMEOUT_S + _START_AND_END_S):
                last = await _read(process, result)
                code = await process.wait()
        finally:
            progress.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()
    result.seconds = round(time.monotonic() - begun, 1)
    if code:
        result.error = "\n".join(last) or f"the process ended with {code} and no output"
    return result


async def _read(process: asyncio.subprocess.Process, result: Search) -> deque[str]:
    """Read the output of libFuzzer into `result`, and return its last lines."""
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    assert process.stdout is not None
    async for raw in process.stdout:
        line = raw.decode(errors="backslashreplace").rstrip()
        if status := _STATUS.match(line):
            result.runs, result.edges = int(status["runs"]), int(status["edges"])
            continue
        if done := _DONE.match(line):
            result.runs = int(done["runs"])
        if written := _SAVED.search(line):
            result.found = written["path"]
        if not _NOISE.match(line):
            last.append(line)
    return last


async def _report_progress(result: Search, begun: float, seconds: float) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_S)
        left_s = max(0, seconds - (time.monotonic() - begun))
        sys.stderr.write(f"{result.target}: {left_s:3.0f} s left, {result.runs:,} inputs, {result.edges} branches\n")


async def run(plan: Plan) -> list[Search]:
    """Fuzz the targets one after the other, and return the results."""
    return [await search(plan, target) for target in plan.targets]


def replay(path: Path) -> None:
    """Run a saved input, whose folder names its target; raises what the target raises. Needs no fuzzer."""
    TARGETS[path.parent.name](path.read_bytes())


def main(
    *,
    seconds: Annotated[float, typer.Option(min=1, help="Duration for each target.")] = 60,
    seed: Annotated[int | None, typer.Option(min=1, help="Decides the inputs.  [default: random]")] = None,
    runs: Annotated[int, typer.Option(help="Maximum number of inputs for each target; -1 for no limit.")] = -1,
    target: Annotated[str, typer.Option(help=f"Fuzz only this target: {', '.join(TARGETS)}.")] = "",
    mutation: Annotated[str, typer.Option(help=f"Remove a protection: {', '.join(MUTATIONS)}.")] = "",
    saved: Annotated[Path | None, typer.Option("--replay", help="Run one saved input.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Search for inputs that break a promise. The exit code is 0 if there are none."""
    if saved is not None:
        replay(saved)
        return
    if target and target not in TARGETS:
        raise typer.BadParameter(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")
    if mutation and mutation not in MUTATIONS:
        raise typer.BadParameter(f"unknown mutation {mutation!r}: choose one of {', '.join(MUTATIONS)}")
    if find_spec("atheris") is None:
        raise typer.BadParameter("atheris has no wheel for this platform: run it on Linux with an x86_64 processor")
    seed = 1 + secrets.randbelow(1_000_000) if seed is None else seed
    sys.stderr.write(f"seed {seed}\n")
    if mutation:
        target = MUTATIONS[mutation][0]
    targets = (target,) if target else tuple(TARGETS)
    searches = asyncio.run(run(Plan(seconds=seconds, seed=seed, runs=runs, targets=targets, mutation=mutation)))
    if as_json:
        sys.stdout.write(json.dumps({"seed": seed, "targets": [asdict(one) for one in searches]}, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(map(str, searches)) + "\n")
    if any(one.error for one in searches):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
