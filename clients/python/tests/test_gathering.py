"""Which claims travel together: the rules of clients/golden/coalescing.json, which every client implements."""

import json
from pathlib import Path
from typing import Any

import pytest

from dedup import gathering
from dedup.gathering import GatheredCall, Gathering

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "coalescing.json").read_text())


def test_the_rules_are_those_of_the_contract() -> None:
    """The figures of every client are the same."""
    assert GOLDEN["coalescing"] == {
        "crowd": gathering.CROWD,
        "max_batch": gathering.MAX_BATCH,
        "max_delay_ms": gathering.MAX_DELAY_S * 1_000,
        "batch_timeout_share": f"1/{1 / gathering.BATCH_TIMEOUT_SHARE:.0f}",
        "first_pause_ms": gathering.FIRST_PAUSE_S * 1_000,
        "longest_pause_ms": gathering.LONGEST_PAUSE_S * 1_000,
        "max_claim_bytes": gathering.MAX_CLAIM_BYTES,
    }


@pytest.mark.parametrize("sequence", GOLDEN["sequences"], ids=lambda sequence: sequence["name"])
def test_claims_are_gathered_by_the_contract(sequence: dict[str, Any]) -> None:
    """Each event of a sequence leads to its calls, and to no others."""
    claims: Gathering[str] = Gathering()
    made: list[GatheredCall[str]] = []
    for event in sequence["events"]:
        now = event["at_ms"] / 1_000
        calls: list[GatheredCall[str] | None] = []
        alone: list[str] = []
        for claim in event.get("claims", ()):
            if claims.admits(now):
                calls.append(claims.add(claim))
            else:
                alone.append(claim)
        if "ended" in event:
            calls.append(claims.ended(made[event["ended"]], now, failed=event.get("failed", False)))
        elif "expired" in event:
            calls.append(claims.expired())
        else:
            calls.append(claims.settle())
        sent = [call for call in calls if call is not None]
        made += sent
        assert [call.claims for call in sent] == event.get("calls", []), event
        assert alone == event.get("alone", []), event
