"""Runs the checks in turn."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

from dedup_service.conformance.checks import CHECKS, Check
from dedup_service.conformance.exchange import Fleet, NoAnswer
from dedup_service.conformance.subject import CouldNotRun, Failed, Plan, Skipped, Subject


class Status(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    COULD_NOT_RUN = "could not run"


@dataclass(frozen=True, slots=True)
class Result:
    """The end of a check. `reason` is empty for a passed one."""

    check: Check
    status: Status
    reason: str = ""


@asynccontextmanager
async def reached(plan: Plan) -> AsyncIterator[Subject]:
    """Yield the service under test. Raises NoAnswer if a process does not answer a GET of the route."""
    async with Fleet(plan.base_urls, plan.headers, plan.timeout_s) as fleet:
        for _ in plan.base_urls:
            await fleet.send("GET", plan.route, None)
        yield Subject(plan, fleet)


async def run_checks(subject: Subject) -> AsyncIterator[Result]:
    """Yield the result of each check. The first request of each goes to another process."""
    for number, check in enumerate(CHECKS):
        subject.fleet.start_at(number)
        yield await _result(check, subject)


async def _result(check: Check, subject: Subject) -> Result:
    try:
        await check.run(subject)
    except Failed as failure:
        return Result(check, Status.FAILED, str(failure))
    except Skipped as skipped:
        return Result(check, Status.SKIPPED, str(skipped))
    except (CouldNotRun, NoAnswer) as cause:
        return Result(check, Status.COULD_NOT_RUN, str(cause))
    return Result(check, Status.PASSED)
