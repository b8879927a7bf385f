"""The mixed-fleet check on guards with one protection removed. `make fleet` runs it on the real ones."""

import shutil

import pytest

from tests.stress.fleet.check import (
    ANSWERED_TWICE,
    DIFFERENT,
    FORGOTTEN,
    NO_CAUSE,
    TWICE,
    UNEXPECTED,
)
from tests.stress.fleet.mutants import MUTATIONS
from tests.stress.fleet.run import Plan, run
from tests.stress.fleet.services import build

# Where each removed protection shows, and one of the findings it leads to.
CAUGHT_BY = {
    "own-ids": ("faults", {TWICE, ANSWERED_TWICE}),
    "own-fingerprint": ("faults", {UNEXPECTED}),
    "releases-on-5xx": ("faults", {TWICE}),
    "releases-on-exception": ("faults", {TWICE}),
    "no-keep-alive": ("long-work", {TWICE, ANSWERED_TWICE}),
    "own-form": ("faults", {DIFFERENT}),
    "other-body": ("faults", {DIFFERENT}),
    "nothing-stored": ("faults", {FORGOTTEN, NO_CAUSE}),
}


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_lost_protection_is_found(mutation: str) -> None:
    """A fleet whose guards in Python lack one protection fails the check."""
    part, kinds = CAUGHT_BY[mutation]
    # One more language, so that the fleet has a guard with the protection.
    programs = ("fastapi", "flask", *(["go"] if build("go") else ["express"] if build("npm") else []))
    # Several tries, since the seed may not choose what shows it.
    for seed in range(3):
        report = run(Plan(seconds=6, keys=40, seed=seed, programs=programs, parts=(part,), mutation=mutation))
        if report.findings:
            break
    assert kinds & {finding.kind for finding in report.findings}, str(report)
    shutil.rmtree(report.history)
