"""Fuzzes every target for so long: `python -m fuzz.run --seconds 60 --seed 1`.

Each target has a process of its own, one after the other, which begins with the inputs of `corpus/` and goes on with
what libFuzzer makes of them. The same seed, inputs and number of runs repeat a search; seconds cut it where they fall.
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
# What one input may take: far more than any does, on a machine that others use as well.
_INPUT_TIMEOUT_S = 20
_INPUT_MEMORY_MIB = 1_024
_PROGRESS_S = 5
_START_AND_END_S = 60
_TOLD = 30

_STATUS = re.compile(r"#(?P<runs>\d+)\s+\w+.*?cov: (?P<edges>\d+)")
_DONE = re.compile(r"Done (?P<runs>\d+) runs")
_NOISE = re.compile(r"INFO|WARNING|MS: |0x|Base64|\\\\|$")
_SAVED = re.compile(r"Test unit written to (?P<path>.+)")


@dataclass
class Search:
    """What came of fuzzing one target."""

    target: str
    runs: int = 0
    """How many inputs it was given."""
    edges: int = 0
    """How many branches of the code they reached."""
    seconds: float = 0.0
    found: str | None = None
    """The file of the input that broke a promise."""
    error: str = ""
    """What the process said last, when it found something or failed."""

    def __str__(self) -> str:
        told = f"{self.target:>13}: {self.runs:9,} inputs in {self.seconds:4.0f} s, {self.edges:4} branches reached"
        if not self.error:
            return f"{told}; nothing found"
        replay = f'make fuzz ARGS="--replay {self.found}"' if self.found else "nothing was saved"
        return f"{told}; FOUND\n\n{self.error}\n\nsaved and to be repeated with: {replay}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run; `mutation` is a protection to take out, or empty."""

    seconds: float
    seed: int
    runs: int = -1
    targets: tuple[str, ...] = tuple(TARGETS)
    mutation: str = ""
    found: Path = field(default=FOUND)


async def search(plan: Plan, target: str) -> Search:
    """Fuzz one target until the time or the number of runs is up, or something is found, and return what came of it."""
    result = Search(target)
    begun = time.monotonic()
    saved = plan.found / target
    saved.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, tempfile.TemporaryDirectory(prefix="fuzz-") as grown:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.stress.fuzz.one", target, plan.mutation),
            *(f"-seed={plan.seed}", f"-max_total_time={max(1, round(plan.seconds))}", f"-runs={plan.runs}"),
            *(f"-max_len={MAX_INPUT_BYTES}", f"-timeout={_INPUT_TIMEOUT_S}", f"-rss_limit_mb={_INPUT_MEMORY_MIB}"),
            *(f"-artifact_prefix={saved}/", grown, str(CORPUS / target)),
            # A set's order would differ from run to run, and with it the search.
            env=_environment() | {"PYTHONHASHSEED": "0", "TMPDIR": folder},
            # atheris tells of exceptions on the one, libFuzzer of everything else on the other.
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        progress = asyncio.create_task(_tell(result, begun, plan.seconds))
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
        result.error = "\n".join(last) or f"the process ended with {code} and said nothing"
    return result


def _environment() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DEDUP_")}
    return clean | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


async def _read(process: asyncio.subprocess.Process, result: Search) -> deque[str]:
    """Follow what libFuzzer says, and return the last of it."""
    last: deque[str] = deque(maxlen=_TOLD)
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


async def _tell(result: Search, begun: float, seconds: float) -> None:
    while True:
        await asyncio.sleep(_PROGRESS_S)
        left_s = max(0, seconds - (time.monotonic() - begun))
        sys.stderr.write(f"{result.target}: {left_s:3.0f} s left, {result.runs:,} inputs, {result.edges} branches\n")


async def run(plan: Plan) -> list[Search]:
    """Fuzz the targets one after the other, and return what came of each."""
    return [await search(plan, target) for target in plan.targets]


def replay(path: Path) -> None:
    """Give a saved input to its target, which is the name of its folder; raise what it raises. Needs no fuzzer."""
    TARGETS[path.parent.name](path.read_bytes())


def main(
    *,
    seconds: Annotated[float, typer.Option(min=1, help="How long each target is fuzzed.")] = 60,
    seed: Annotated[int | None, typer.Option(min=1, help="Decides the inputs.  [default: chance]")] = None,
    runs: Annotated[int, typer.Option(help="At most so many inputs for each target; -1 for no limit.")] = -1,
    target: Annotated[str, typer.Option(help=f"Fuzz one alone: {', '.join(TARGETS)}.")] = "",
    mutation: Annotated[str, typer.Option(help=f"Take a protection out: {', '.join(MUTATIONS)}.")] = "",
    saved: Annotated[Path | None, typer.Option("--replay", help="Repeat one saved input.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report for machines.")] = False,
) -> None:
    """Look for inputs that break a promise; the exit code is 0 when there were none."""
    if saved is not None:
        replay(saved)
        return
    if target and target not in TARGETS:
        raise typer.BadParameter(f"there is no target {target}: take one of {', '.join(TARGETS)}")
    if mutation and mutation not in MUTATIONS:
        raise typer.BadParameter(f"there is no mutation {mutation}: take one of {', '.join(MUTATIONS)}")
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
