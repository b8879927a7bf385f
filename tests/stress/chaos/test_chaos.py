"""The history check on the real service, and on servers with one protection removed."""

import shutil

import pytest

from tests.stress.chaos.mutants import MUTATIONS
from tests.stress.chaos.run import Plan, run

# Seconds until each removed protection reliably shows, and the kinds of finding, one of which is enough. Contention and
# retries need no fault. A resend needs a lost reply, which is rare.
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
    """Promises 1 and 2: no answer contradicts the history of a claim, whatever is dropped, paused or killed."""
    report = run(Plan(seconds=18, seed=1))
    assert not report.findings, str(report)
    # A run in which too little happened proves nothing.
    assert not report.not_shown, str(report)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_lost_protection_is_found(mutation: str) -> None:
    """A server with one protection removed fails the check."""
    seconds, kinds = CAUGHT_AS[mutation]
    faults = ("drop-replies", "delay-replies")
    report = run(Plan(seconds=seconds, seed=1, servers=2, clients=2, mutation=mutation, faults=faults))
    assert kinds & {finding.kind for finding in report.findings}, str(report)
    shutil.rmtree(report.history)
