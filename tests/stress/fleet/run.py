"""Runs the mixed-fleet check: `python -m tests.stress.fleet.run --seconds 20 --seed 1`.

Services in every language stand behind one route, over one Redis and one dedup service. A run has two parts:

- `faults`: replies are lost, connections cut, services and the dedup service killed. The lease outlasts the run, since
  another caller may repeat the work of a killed service once its lease has ended.
- `long-work`: the work takes 2.5 leases, so that only keep-alive protects it. Replies are lost, and connections to the
  dedup service cut; nothing is killed, so every key must end with one row.

The seed decides keys, work, lost replies and the order of the faults, but not how processes interleave. The history is
kept if there are findings.
"""

import asyncio
import json
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tests.stress.fleet.callers import Caller, Order
from tests.stress.fleet.check import check, stalls
from tests.stress.fleet.deployment import Deployment, Fault, watch_stalls
from tests.stress.fleet.history import FAILING, LONG, SHORT, Disturbance, History
from tests.stress.fleet.mutants import MUTATIONS
from tests.stress.fleet.nemesis import Nemesis
from tests.stress.fleet.report import Report, count
from tests.stress.fleet.route import Route
from tests.stress.fleet.services import PROGRAMS, TOOLS, Service, build
from tests.support.polling import eventually

_PROGRESS_S = 5
_LEAST_KEYS = 200
# At so many keys at a time a slow machine is slower, and not overloaded.
_KEYS_AT_ONCE = 16
_LONG_KEYS_OF_EACH_SERVICE = 2
# Of long work, while the machine stalls.
_TRIES = 3
_LONGEST_WORK_MS = 500
_FAILING_SHARE = 0.04
# Callers give up on a key after so many refusals; the audit asks for it again.
_PATIENCE = 3
_AUDIT_ROUNDS = 3
_AUDITED_AT_ONCE = 10
_LONG_LEASE_S = 24 * 3600
_SHORTEST_LEASE_S = 4
_LEASES_OF_WORK = 2.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run. `mutation` is a protection to remove, or empty."""

    seconds: float
    seed: int
    keys: int = _LEAST_KEYS
    programs: Sequence[str] = tuple(PROGRAMS)
    parts: Sequence[str] = ("faults", "long-work")
    mutation: str = ""


class Run:
    """One run: its processes and its history."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._rng = random.Random(plan.seed)
        self.history = History(tuple(plan.programs))
        self._deployment = Deployment(folder, self.history, self._rng)
        self._started_s = 0.0

    async def run(self) -> None:
        """Record the history of every part, and end every process."""
        watch = asyncio.create_task(watch_stalls(self.history))
        try:
            async with self._deployment:
                if "faults" in self._plan.parts:
                    await self._faults()
                if "long-work" in self._plan.parts:
                    await self._long_work()
                rows = await self._deployment.rows()
                self.history.rows += (row for row in rows if row.key not in self.history.discarded)
        finally:
            watch.cancel()

    async def _faults(self) -> None:
        """Send one key after another while faults are injected, for the time and at least the keys of the plan."""
        orders: list[Order] = []
        async with AsyncExitStack() as stack:
            services = await self._start(stack, _LONG_LEASE_S)
            route, caller = await self._open(stack, services)
            self._report_progress(stack, "faults", route)
            until_ns = time.monotonic_ns() + int(self._plan.seconds * 1e9)
            nemeses = [
                Nemesis(self._deployment.faults, self._rng),
                Nemesis({f"kill-{one.name}": self._killing(one, route) for one in services}, self._rng),
            ]

            async def send_keys() -> None:
                while disturbing or len(orders) < self._plan.keys:
                    order = self._next_order(len(orders))
                    orders.append(order)
                    async with asyncio.TaskGroup() as tasks:
                        for _ in services:
                            tasks.create_task(self._later(self._rng.uniform(0, 1), caller.send(order, _PATIENCE)))

            async with asyncio.TaskGroup() as tasks:
                disturbing = {tasks.create_task(nemesis.run(until_ns)) for nemesis in nemeses}
                for task in disturbing:
                    task.add_done_callback(disturbing.discard)
                for _ in range(_KEYS_AT_ONCE):
                    tasks.create_task(send_keys())
            await self._audit(route, caller, orders)

    def _next_order(self, number: int) -> Order:
        chance = random.Random(f"{self._plan.seed} {number}")
        fails = chance.random() < _FAILING_SHARE
        order = Order(f"short-{self._plan.seed}-{number}", chance.randint(1, _LONGEST_WORK_MS), fails=fails)
        self.history.keys[order.key] = FAILING if fails else SHORT
        return order

    async def _long_work(self) -> None:
        """Run work of several leases. A stall of the machine can end a lease, so a longer one is tried after it."""
        # A slow machine needs a longer lease: it starts services slowly.
        lease_s = max(_SHORTEST_LEASE_S, round(self._started_s))
        for _ in range(_TRIES):
            begin_ns = time.monotonic_ns()
            keys = await self._long_work_with(lease_s)
            stall_s = stalls(self.history.disturbances, begin_ns)
            if stall_s < lease_s / 4:
                return
            sys.stderr.write(f"long-work: the machine stalled for {stall_s:.1f} s; again with a longer lease\n")
            self.history.discard(keys)
            lease_s *= 2

    async def _long_work_with(self, lease_s: int) -> set[str]:
        async with AsyncExitStack() as stack:
            services = await self._start(stack, lease_s)
            work_ms = round(lease_s * _LEASES_OF_WORK * 1000)
            first = {
                Order(f"long-{self._plan.seed}-{lease_s}-{one.name}-{number}", work_ms): one
                for one in services
                for number in range(_LONG_KEYS_OF_EACH_SERVICE)
            }
            self.history.keys.update({order.key: LONG for order in first})
            route, caller = await self._open(stack, services)
            route.cutting = False
            for order, service in first.items():
                route.begin_with(order.key, service)
            self._report_progress(stack, "long-work", route)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._cut_connections(work_ms / 1000))
                for order in first:
                    for number, _ in enumerate(services):
                        pause_s = self._rng.uniform(0, lease_s) if number else 0
                        tasks.create_task(self._later(pause_s, caller.send(order, sys.maxsize)))
            await self._audit(route, caller, list(first))
            return {order.key for order in first}

    async def _cut_connections(self, work_s: float) -> None:
        """Cut the connections to the dedup service in each third of the work."""
        for _ in range(3):
            await asyncio.sleep(self._rng.uniform(0, work_s / 3))
            await self._deployment.cut_claim_connections()

    async def _start(self, stack: AsyncExitStack, lease_s: int) -> list[Service]:
        """Start every service at once."""
        environment = self._deployment.environment | {"CLAIM_TTL": str(lease_s)}
        services = []
        for name in self._plan.programs:
            log = self._folder / f"{name}.log"
            service = Service(name, environment, log, self._plan.mutation)
            stack.callback(service.kill)
            services.append(service)
        begin_s = time.monotonic()
        await asyncio.gather(*(asyncio.to_thread(service.start) for service in services))
        self._started_s = time.monotonic() - begin_s
        return services

    async def _open(self, stack: AsyncExitStack, services: list[Service]) -> tuple[Route, Caller]:
        route = await stack.enter_async_context(Route(services, self.history, self._plan.seed))
        caller = Caller(route.url, self._rng)
        stack.push_async_callback(caller.close)
        return route, caller

    async def _later(self, pause_s: float, sending: Coroutine[None, None, None]) -> None:
        await asyncio.sleep(pause_s)
        await sending

    async def _audit(self, route: Route, caller: Caller, orders: Sequence[Order]) -> None:
        """Ask every service for every key, without faults, until they agree or have been asked several times."""
        await eventually(lambda: self._is_quiet(route), what="the work to end")
        route.losing = route.cutting = False
        route.auditing = True
        at_once = asyncio.Semaphore(_AUDITED_AT_ONCE)

        async def audit(order: Order) -> None:
            for number in range(_AUDIT_ROUNDS):
                async with at_once:
                    answers = [await caller.post(order) for _ in self._plan.programs]
                if all(answer is not None and answer.is_success for answer in answers):
                    return
                # What began before the audit may end during it.
                await asyncio.sleep(1 if number < _AUDIT_ROUNDS - 1 else 0)

        await asyncio.gather(*map(audit, orders))

    async def _is_quiet(self, route: Route) -> bool:
        return not route.in_flight.total() and not await self._deployment.is_working()

    def _report_progress(self, stack: AsyncExitStack, part: str, route: Route) -> None:
        async def report() -> None:
            begin_s = time.monotonic()
            while True:
                await asyncio.sleep(_PROGRESS_S)
                sys.stderr.write(
                    f"{part}: {time.monotonic() - begin_s:4.0f} s, {len(self.history.attempts)} attempts, "
                    f"{route.in_flight.total()} in flight, {len(self.history.disturbances)} disturbances\n"
                )

        stack.callback(asyncio.create_task(report()).cancel)

    def _killing(self, service: Service, route: Route) -> Fault:
        async def kill() -> None:
            """Kill the service while it works, if it has work, and start it again."""
            for _ in range(200):
                if route.in_flight[service.name]:
                    break
                await asyncio.sleep(0.01)
            begin_ns = time.monotonic_ns()
            await asyncio.to_thread(service.kill)
            end_ns = time.monotonic_ns()
            self.history.disturbances.append(
                Disturbance(kind=f"kill-{service.name}", subject=service.name, begin_ns=begin_ns, end_ns=end_ns)
            )
            await asyncio.sleep(self._rng.uniform(0, 0.5))
            # A service that cannot reach its database exits, and a supervisor starts it again.
            await asyncio.to_thread(service.start, tries=10)

        return kill


def run(plan: Plan, not_run: Sequence[str] = ()) -> Report:
    """Run the parts of a plan, check the history, and return the report.

    Ends every process it starts. Keeps the folder of the history and the logs if there are findings.
    """
    # A short path: a Unix socket path has a limit of about 100 bytes.
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    begin_s = time.monotonic()
    found = False
    try:
        one = Run(plan, folder)
        asyncio.run(one.run())
        verdict = check(one.history)
        found = bool(verdict.findings)
        one.history.write(folder / "history.json")
        numbers, ran, faults, not_shown = count(one.history, verdict)
        if one.history.discarded and LONG not in one.history.keys.values():
            not_shown.append("long work without a stall of the machine")
        return Report(
            plan.seed,
            time.monotonic() - begin_s,
            numbers,
            ran,
            faults,
            verdict.findings,
            not_shown,
            list(not_run),
            str(folder),
        )
    finally:
        if not found:
            shutil.rmtree(folder)


def main(
    *,
    seconds: Annotated[float, typer.Option(help="How long faults are injected.")] = 20,
    keys: Annotated[int, typer.Option(min=1, help="How many keys are sent under faults, at least.")] = _LEAST_KEYS,
    seed: Annotated[int | None, typer.Option(help="Decides keys, work and faults.  [default: random]")] = None,
    require: Annotated[list[str] | None, typer.Option(help="Fail if this tool is missing: go or npm.")] = None,
    mutation: Annotated[str, typer.Option(help=f"Remove a protection: {', '.join(MUTATIONS)}.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check that a fleet of several languages does the work of each key once. The exit code is 0 if it did."""
    if mutation and mutation not in MUTATIONS:
        raise typer.BadParameter(f"unknown mutation {mutation!r}: choose one of {', '.join(MUTATIONS)}")
    missing = [tool for tool in TOOLS if not build(tool)]
    if required := [tool for tool in missing if tool in (require or ())]:
        sys.stderr.write(f"missing and required: {', '.join(required)}\n")
        raise typer.Exit(1)
    programs = [name for name, program in PROGRAMS.items() if program.tool not in missing]
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    sys.stderr.write(f"seed {seed}\n")
    plan = Plan(seconds=seconds, seed=seed, keys=keys, programs=programs, mutation=mutation)
    report = run(plan, [name for name in PROGRAMS if name not in programs])
    sys.stdout.write((json.dumps(report.as_json(), indent=2) if as_json else str(report)) + "\n")
    if report.findings or report.not_shown:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
