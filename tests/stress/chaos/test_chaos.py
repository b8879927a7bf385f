"""The history check on servers with one protection removed. `make chaos` runs it on whole servers, under faults."""

import shutil

import pytest

from tests.stress.chaos.check import NOT_LINEARIZABLE
from tests.stress.chaos.deployments import DEPLOYMENTS
from tests.stress.chaos.mutants import MUTATIONS
from tests.stress.chaos.run import Plan, rotation, run

# Seconds until each removed protection shows on a fast machine, where, and the faults. Most need contention only.
_LOST_REPLIES = ("drop-replies", "delay-replies")
CAUGHT_IN: dict[str, tuple[float, str, tuple[str, ...]]] = dict.fromkeys(MUTATIONS, (3, "redis", ())) | {
    "client-retries": (12, "redis", _LOST_REPLIES),
    "no-replicas": (15, "sentinel", ("kill-master-ahead-of-replica",)),
    "file-overwritten": (3, "sqlite", ()),
}


@pytest.mark.parametrize("seed", range(len(DEPLOYMENTS)))
def test_every_deployment_has_its_turn(seed: int) -> None:
    """The default time has room for all; less has room for some, and the seed chooses which."""
    assert sorted(name for name, _ in rotation(180, seed)) == sorted(DEPLOYMENTS)
    assert sum(seconds for _, seconds in rotation(30, seed)) == 30
    assert rotation(5, seed) == [(list(DEPLOYMENTS)[seed], 5)]


# In `make test`; `make nightly` runs the others too.
_QUICK = ("any-token-ends", "check-then-set", "file-overwritten", "wait-claims-nothing")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "mutation", [pytest.param(one, marks=[] if one in _QUICK else pytest.mark.nightly) for one in MUTATIONS]
)
def test_a_lost_protection_is_found(mutation: str) -> None:
    """Servers with one protection removed fail the check."""
    seconds, deployment, faults = CAUGHT_IN[mutation]
    # Several tries, since a slow machine makes few calls in the time.
    for seed in range(5):
        plan = Plan(seconds=seconds, seed=seed, deployment=deployment, clients=2, mutation=mutation, faults=faults)
        report = run(plan)
        if report.findings:
            break
    assert NOT_LINEARIZABLE in {finding.kind for finding in report.findings}, str(report)
    shutil.rmtree(report.history)
