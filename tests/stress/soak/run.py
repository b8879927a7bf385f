"""Runs one soak: `python -m tests.stress.soak.run --seconds 600 --engine grpcio --seed 1`. Linux only.

Callers run the scenarios against one service over one Redis with persistence, which is killed and restarted twice. The
seed decides the scenarios and their choices, not how processes interleave.
"""

import asyncio
import json
import random
import secrets
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import redis
import typer

from dedup_service.config.settings import EngineName
from tests.stress.soak.calls import Caller, Doubt, Tally
from tests.stress.soak.report import Report
from tests.stress.soak.samples import Sample, take_sample
from tests.stress.soak.scenarios import SCENARIOS
from tests.stress.soak.verdict import judge, kept
from tests.support.polling import eventually
from tests.support.processes import RedisProcess, ServiceProcess

CALLERS = 8
MOST_SAMPLES = 300
_LEAST_SAMPLE_S = 1.0
_PROGRESS_S = 5
_AWAY_S = 0.5
# Share of scenarios on a connection of their own.
_CHURN = 0.1
_PAUSE_S = 0.03
_WARM_UP = 20
# grpcio's log line for an answer whose caller had gone: about once in half a million calls here.
_UNSENT = "ExecuteBatchError raised in core"
# Otherwise channels of one process to one address share a connection.
_CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run."""

    seconds: float
    seed: int
    engine: EngineName = "grpcio"
    leak: bool = False


class Soak:
    """The load on one service, and the samples of its resource use."""

    def __init__(self, plan: Plan, service: ServiceProcess, server: RedisProcess, client: redis.Redis) -> None:
        self._plan = plan
        self._service = service
        self._redis = server
        self._client = client
        self._begun = time.monotonic()
        self._until = self._begun + plan.seconds
        self.tally = Tally()
        self.samples: list[Sample] = []
        self.restarts = 0

    async def run(self) -> tuple[Sample, Sample]:
        """Load the service until the time is up, and return a sample from before the load and one from after it."""
        warm = random.Random(f"{self._plan.seed}-warm")
        for _ in range(_WARM_UP):
            await self._one_scenario(warm, None)
        before = await self._quiet(None)
        helpers = [
            asyncio.create_task(work) for work in (self._report_progress(), self._restart_redis(), self._take_samples())
        ]
        async with asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(self._call(random.Random(f"{self._plan.seed}-{number}")))
        for helper in helpers:
            helper.cancel()
            with suppress(asyncio.CancelledError):
                await helper
        return before, await self._quiet(before)

    async def _call(self, rng: random.Random) -> None:
        async with grpc.aio.insecure_channel(self._service.target, _CHANNEL_OPTIONS) as channel:
            while time.monotonic() < self._until:
                await self._one_scenario(rng, None if rng.random() < _CHURN else channel)
                await asyncio.sleep(rng.uniform(0, 2 * _PAUSE_S))

    async def _one_scenario(self, rng: random.Random, channel: grpc.aio.Channel | None) -> None:
        scenario = rng.choices(list(SCENARIOS), list(SCENARIOS.values()))[0]
        self.tally.scenarios[scenario.__name__] += 1
        async with AsyncExitStack() as stack:
            if channel is None:
                own = grpc.aio.insecure_channel(self._service.target, _CHANNEL_OPTIONS)
                channel = await stack.enter_async_context(own)
            try:
                await scenario(Caller(channel, self.tally, rng))
            except grpc.aio.AioRpcError as error:
                self.tally.add_wrong(f"{scenario.__name__}: {error.code().name}, {error.details()}")
            except Doubt as doubt:
                self.tally.add_wrong(f"{scenario.__name__}: {doubt}")

    async def _sample(self) -> Sample:
        seconds = time.monotonic() - self._begun
        return await asyncio.to_thread(take_sample, self._service, self._client, seconds, self.tally.tries)

    async def _take_samples(self) -> None:
        pause = max(_LEAST_SAMPLE_S, self._plan.seconds / MOST_SAMPLES)
        while True:
            self.samples.append(await self._sample())
            await asyncio.sleep(pause)

    async def _quiet(self, before: Sample | None) -> Sample:
        """Return a sample once resource use is stable or back to `before`, or at a timeout."""
        taken = [await self._sample()]

        async def settled() -> bool:
            taken.append(await self._sample())
            last, now = taken[-2:]
            if before is None:
                return (last.file_descriptors, last.threads) == (now.file_descriptors, now.threads)
            return not kept(before, self.samples, now)

        with suppress(AssertionError):
            await eventually(settled)
        return taken[-1]

    async def _restart_redis(self) -> None:
        for _ in range(2):
            await asyncio.sleep(self._plan.seconds / 3)
            port = self._redis.port
            self._redis.stop()
            await asyncio.sleep(_AWAY_S)
            await asyncio.to_thread(self._redis.start, port)
            self.restarts += 1

    async def _report_progress(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_S)
            now = self.samples[-1]
            sys.stderr.write(
                f"{self._until - time.monotonic():4.0f} s left, {now.calls:,} calls, {now.rss_bytes / 2**20:.1f} MiB, "
                f"{now.file_descriptors} descriptors, {now.threads} threads, {self.tally.answers['wrong']} wrong\n"
            )


def run(plan: Plan) -> Report:
    """Load a service and return the report. Ends every process it starts."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        # A killed process keeps its writes without fsync.
        server = RedisProcess(Path(folder), "--appendonly", "yes", "--appendfsync", "no").start()
        arguments = ("--store-url", server.url, "--engine", plan.engine, "--metrics-listen", "127.0.0.1:0")
        service = ServiceProcess(
            *arguments,
            # ServiceProcess would keep the log line of every call.
            environment={"DEDUP_LOG_SAMPLE": "0"},
            command=("tests.stress.soak.leaky",) if plan.leak else ("dedup_service",),
        )
        try:
            service.start()
            with redis.Redis(port=server.port) as client:
                soak = Soak(plan, service, server, client)
                before, after = asyncio.run(soak.run())
            code = service.stop()
        finally:
            service.kill()
            server.stop()
        errors = [json.dumps(line) for line in service.logs if line["level"] == "error"]
        unsent = [error for error in errors if _UNSENT in error]
        errors = [error for error in errors if _UNSENT not in error]
        if code:
            errors.append(f"the service ended with {code}")
        verdict = judge(before, soak.samples, after)
        samples = [before, *soak.samples, after]
        return Report(plan.engine, plan.seed, soak.tally, soak.restarts, samples, verdict, errors, len(unsent))


def main(
    *,
    seconds: Annotated[float, typer.Option(min=5, help="Duration of the load.")] = 600,
    seed: Annotated[int | None, typer.Option(help="Decides the scenarios.  [default: random]")] = None,
    engine: Annotated[EngineName, typer.Option()] = "grpcio",
    leak: Annotated[
        bool, typer.Option("--leak", help="Run a service that leaks every request, which the soak must find.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run a mixed load. The exit code is 0 if all answers were right and resource use stayed flat."""
    if sys.platform != "linux":
        raise typer.BadParameter("the soak reads process memory from /proc: run it on Linux")
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    sys.stderr.write(f"seed {seed}\n")
    report = run(Plan(seconds=seconds, seed=seed, engine=engine, leak=leak))
    sys.stdout.write((json.dumps(report.as_json(), indent=2) if as_json else str(report)) + "\n")
    if not report.passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
