"""One soak: `python -m soak.run --seconds 600 --engine grpcio --seed 1`, on Linux.

One service over one Redis that keeps what it acknowledged; callers that go through the scenarios; and a Redis that is
killed and started again twice. The seed decides the scenarios and their choices, not how processes interleave.
"""

import asyncio
import json
import os
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
from tests.support.polling import eventually
from tests.support.processes import RedisProcess, ServiceProcess
from tests.stress.soak.calls import Caller, Doubt, Tally
from tests.stress.soak.report import Report
from tests.stress.soak.samples import Sample, look
from tests.stress.soak.scenarios import SCENARIOS
from tests.stress.soak.verdict import judge, kept

CALLERS = 8
MOST_SAMPLES = 300
_LEAST_SAMPLE_S = 1.0
_PROGRESS_S = 5
_AWAY_S = 0.5
# How many of the scenarios have a connection of their own.
_CHURN = 0.1
_PAUSE_S = 0.03
_WARM_UP = 20
# grpcio's words for an answer whose caller had gone by the time that it was sent: once in half a million calls here.
_UNSENT = "ExecuteBatchError raised in core"
# Else the channels of one process to one address share a connection.
_CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run."""

    seconds: float
    seed: int
    engine: EngineName = "grpcio"
    leak: bool = False


class Soak:
    """The load on one service, and the looks at it."""

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
        """Load the service until the time is up, and return what it took before the load and after it."""
        warm = random.Random(f"{self._plan.seed}-warm")
        for _ in range(_WARM_UP):
            await self._one_scenario(warm, None)
        before = await self._quiet(None)
        helpers = [asyncio.create_task(work) for work in (self._tell(), self._restart_redis())]
        looks = asyncio.create_task(self._look())
        async with asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(self._call(random.Random(f"{self._plan.seed}-{number}")))
        for helper in (*helpers, looks):
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
                self.tally.is_wrong(f"{scenario.__name__}: {error.code().name}, {error.details()}")
            except Doubt as doubt:
                self.tally.is_wrong(f"{scenario.__name__}: {doubt}")

    async def _sample(self) -> Sample:
        seconds = time.monotonic() - self._begun
        return await asyncio.to_thread(look, self._service, self._client, seconds, self.tally.tries)

    async def _look(self) -> None:
        pause = max(_LEAST_SAMPLE_S, self._plan.seconds / MOST_SAMPLES)
        while True:
            self.samples.append(await self._sample())
            await asyncio.sleep(pause)

    async def _quiet(self, before: Sample | None) -> Sample:
        """Return a sample once what the callers took is given back, or when it was not for long."""
        taken = [await self._sample()]

        async def given_back() -> bool:
            taken.append(await self._sample())
            last, now = taken[-2:]
            if before is None:
                return (last.file_descriptors, last.threads) == (now.file_descriptors, now.threads)
            return not kept(before, self.samples, now)

        with suppress(AssertionError):
            await eventually(given_back)
        return taken[-1]

    async def _restart_redis(self) -> None:
        for _ in range(2):
            await asyncio.sleep(self._plan.seconds / 3)
            port = self._redis.port
            self._redis.stop()
            await asyncio.sleep(_AWAY_S)
            await asyncio.to_thread(self._redis.start, port)
            self.restarts += 1

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_S)
            now = self.samples[-1]
            sys.stderr.write(
                f"{self._until - time.monotonic():4.0f} s left, {now.calls:,} calls, {now.rss_bytes / 2**20:.1f} MiB, "
                f"{now.file_descriptors} descriptors, {now.threads} threads, {self.tally.answers['wrong']} wrong\n"
            )


def run(plan: Plan) -> Report:
    """Load a service, and return what it answered and what it took. All that it starts has ended when it returns."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        # Written before each answer, though not to the disk: that is what a killed process keeps.
        server = RedisProcess(Path(folder), "--appendonly", "yes", "--appendfsync", "no").start()
        arguments = ("--store-url", server.url, "--engine", plan.engine, "--metrics-listen", "127.0.0.1:0")
        service = ServiceProcess(
            *arguments,
            # The log of every call would be kept here, line by line.
            environment={"DEDUP_LOG_SAMPLE": "0", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
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
    seconds: Annotated[float, typer.Option(min=5, help="How long the callers call.")] = 600,
    seed: Annotated[int | None, typer.Option(help="Decides what they call.  [default: chance]")] = None,
    engine: Annotated[EngineName, typer.Option()] = "grpcio",
    leak: Annotated[bool, typer.Option("--leak", help="Keep every request for ever, which has to be found.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report for machines.")] = False,
) -> None:
    """Load the service with a bit of everything; the exit code is 0 when all answers were right and it kept flat."""
    if sys.platform != "linux":
        raise typer.BadParameter("the soak reads the memory of a process from /proc: run it on Linux")
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    sys.stderr.write(f"seed {seed}\n")
    report = run(Plan(seconds=seconds, seed=seed, engine=engine, leak=leak))
    sys.stdout.write((json.dumps(report.as_json(), indent=2) if as_json else str(report)) + "\n")
    if not report.passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
