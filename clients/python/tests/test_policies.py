"""The rules of namespaces, played against the fake and the service (`clients/golden/policies.json`)."""

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dedup import DuplicateTransaction, InvalidRequest, PayloadMismatch
from dedup.testing import FakeService, Policy
from tests.support.processes import ServiceProcess, run_command

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[2] / "golden" / "policies.json").read_text())
FIELDS = ("default_ttl", "max_ttl", "retention")
# The service reads its clock once for the reply and once for the store.
SLACK = timedelta(minutes=1)


def policy_of(rules: dict[str, Any]) -> Policy:
    """Return the policy of a vector for the fake."""
    spans = {name: timedelta(milliseconds=rules[f"{name}_ms"]) for name in FIELDS if f"{name}_ms" in rules}
    return Policy(**spans, shadow=rules.get("shadow", False))


def policy_file(path: Path, namespaces: dict[str, Any], *, allow_unknown: bool) -> Path:
    """Write the policy file of a scenario for the service."""
    lines = [f"allow_unknown_namespaces = {json.dumps(allow_unknown)}"]
    for name, rules in namespaces.items():
        lines.append(f"[namespaces.{name}]")
        lines += [f'{field} = "{rules[f"{field}_ms"]}ms"' for field in FIELDS if f"{field}_ms" in rules]
        lines += ['mode = "shadow"'] if rules.get("shadow") else []
    path.write_text("\n".join(lines) + "\n")
    return path


def service_of(scenario: dict[str, Any], folder: Path, start: Callable[..., ServiceProcess]) -> str:
    """Start the service with the rules of a scenario, and return its address."""
    allow_unknown = scenario.get("allow_unknown_namespaces", True)
    path = policy_file(folder / "policy.toml", scenario["namespaces"], allow_unknown=allow_unknown)
    options = ("--policy-file", str(path), "--max-result-bytes", str(scenario.get("max_result_bytes", 4096)))
    return start("--store-url", f"sqlite://{folder / 'claims.db'}", *options).target


def set_rules(fake: FakeService, scenario: dict[str, Any]) -> None:
    """Give the fake the rules of a scenario."""
    fake.policies = {name: policy_of(rules) for name, rules in scenario["namespaces"].items()}
    fake.allow_unknown_namespaces = scenario.get("allow_unknown_namespaces", True)
    fake.max_result_bytes = scenario.get("max_result_bytes", 4096)


@pytest.mark.parametrize("threaded", [False, True], ids=["aio", "sync"])
@pytest.mark.parametrize("live", [False, True], ids=["fake", "live"])
@pytest.mark.parametrize("scenario", GOLDEN["scenarios"], ids=lambda scenario: scenario["name"])
async def test_the_fake_has_the_rules_of_the_service(
    *,
    scenario: dict[str, Any],
    threaded: bool,
    live: bool,
    tmp_path: Path,
    start_service: Callable[..., ServiceProcess],
    make_world: Callable[..., Any],
) -> None:
    """Lifetimes, limits and shadow mode of a namespace are the same in both."""
    target = await asyncio.to_thread(service_of, scenario, tmp_path, start_service) if live else None
    world = make_world(target, threaded=threaded)
    set_rules(world.fake, scenario)
    client, claims = world.client(timeout=20), dict[str, Any]()
    for step in scenario["steps"]:
        try:
            happened = await played(client, claims, step)
        except PayloadMismatch:
            happened = "mismatch"
        except DuplicateTransaction:
            happened = "duplicate"
        except InvalidRequest as error:
            happened = f"invalid {' '.join(error.violations)}"
        assert happened == " ".join([step["expect"], *([step["field"]] if "field" in step else [])]), step


async def played(client: Any, claims: dict[str, Any], step: dict[str, Any]) -> str:
    """Play one step, check its times, and return what happened."""
    ttl = None if "ttl_ms" not in step else timedelta(milliseconds=step["ttl_ms"])
    if step["do"] == "claim":
        fingerprint = step.get("fingerprint", "").encode()
        claim = await client.claim(step["id"], namespace=step["namespace"], ttl=ttl, fingerprint=fingerprint)
        claims[step.get("as", "")] = claim
        if claim.shadow_duplicate:
            return "shadow_duplicate"
        check(step, "lease_ms", claim.transaction, claim.transaction.claim_time)
        return "claimed"
    claim = claims[step["claim"]]
    if step["do"] == "complete":
        completed = await claim.complete(b"x" * step.get("result_bytes", 0), ttl=ttl)
        check(step, "retained_ms", completed, completed.completion_time)
        return "completed"
    if step["do"] == "extend":
        extended = await claim.extend(ttl)
        check(step, "lease_ms", extended, extended.claim_time)
        return "extended"
    await claim.release()
    return "released"


def check(step: dict[str, Any], name: str, transaction: Any, begin: Any) -> None:
    """Check a lifetime of a step."""
    expected = timedelta(milliseconds=step[name])
    assert abs(transaction.expire_time - begin - expected) < SLACK, step


@pytest.mark.parametrize("case", GOLDEN["invalid_policies"], ids=lambda case: case["why"])
def test_a_policy_that_the_service_rejects(case: dict[str, Any], tmp_path: Path) -> None:
    """The fake rejects it, too."""
    with pytest.raises(ValueError, match="between 1 ms and max_ttl"):
        policy_of(case["policy"])
    path = policy_file(tmp_path / "policy.toml", {"pay": case["policy"]}, allow_unknown=True)
    store = f"sqlite://{tmp_path / 'claims.db'}"
    refused = run_command("serve", "--listen", "127.0.0.1:0", "--store-url", store, "--policy-file", str(path))
    assert refused.returncode != 0
    assert "is longer than" in refused.stderr
