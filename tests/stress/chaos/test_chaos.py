"""The history check on the real service, and on servers that each lack one protection."""

import shutil

import pytest

from tests.stress.chaos.mutants import MUTATIONS
from tests.stress.chaos.run import Plan, run

# How long it takes until each lost protection has surely shown itself, and as what, of which one is enough. Contention
# and retries need no fault; a resend needs a lost reply, so it is rare.
CAUGHT_AS = {
    "any-token-holds": (6, {"answer-of-another", "two-holders"}),
    "no-token-holds": (6, {"retry-refused"}),
    "any-token-ends": (6, {"held-by-nobody", "two-holders"}),
    "no-nx": (6, {"two-holders"}),
    "check-then-set": (6, {"two-holders"}),
    "client-retries": (12, {"replay-of-nothing", "held-by-nobody", "claim-lost"}),
}


@pytest.mark.timeout(240)
def test_the_promises_hold_under_faults() -> None:
    """Promises 1 and 2: nobody is told what a claim's history forbids, whatever is dropped, paused or killed."""
    report = run(Plan(seconds=18, seed=1))
    assert not report.findings, str(report)
    # A run in which too little happened would show nothing.
    assert not report.not_shown, str(report)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_lost_protection_is_found(mutation: str) -> None:
    """A server without one of its protections does not pass the check."""
    seconds, kinds = CAUGHT_AS[mutation]
    faults = ("drop-replies", "delay-replies")
    report = run(Plan(seconds=seconds, seed=1, servers=2, clients=2, mutation=mutation, faults=faults))
    assert kinds & {finding.kind for finding in report.findings}, str(report)
    shutil.rmtree(report.history)
