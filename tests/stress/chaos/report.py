"""The report of a run: counts, findings, and whether enough happened for a run without findings to count."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.stress.chaos.check import UNDECIDED, Finding, Verdict
from tests.stress.chaos.history import Call

_WANTED = (
    *("won", "replays", "replays that saved", "duplicates", "mismatches", "won in a batch", "won after a wait"),
    *("completed", "released", "extended", "not held", "found", "not found", "unknown"),
)


@dataclass(frozen=True)
class Report:
    """The result of one run over one deployment."""

    deployment: str
    seed: int
    numbers: dict[str, int]
    errors: dict[str, int]
    """By code, reason and applied."""
    faults: dict[str, int]
    findings: list[Finding]
    history: str
    """The folder of the history files, kept if there are findings."""

    @property
    def not_shown(self) -> list[str]:
        """Events that never happened, so that the run proves nothing about them."""
        wanted = {name: self.numbers[name] for name in _WANTED}
        return [name for name, number in (wanted | self.faults).items() if number == 0]

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "deployment": self.deployment,
            "seed": self.seed,
            "numbers": self.numbers,
            "errors": self.errors,
            "faults": self.faults,
            "violations": [str(finding) for finding in self.findings],
            "showed_nothing_of": self.not_shown,
            "history": self.history if self.findings else None,
        }

    def __str__(self) -> str:
        lines = [f"{self.deployment}, seed {self.seed}"]
        for title, numbers in (("calls", self.numbers), ("errors", self.errors), ("faults", self.faults)):
            lines += ["", title, *(f"  {number:8,}  {name}" for name, number in numbers.items())]
        kinds = Counter(finding.kind for finding in self.findings)
        lines += ["", f"violations: {len(self.findings)} {dict(kinds) if kinds else ''}".rstrip()]
        seen: Counter[str] = Counter()
        for finding in self.findings:
            seen[finding.kind] += 1
            if seen[finding.kind] <= 3:
                lines += ["", str(finding)]
        if self.findings:
            lines += ["", f"history: {self.history}"]
        if self.not_shown:
            lines += ["", f"inconclusive, never happened: {', '.join(self.not_shown)}"]
        return "\n".join(lines)


def count(calls: Sequence[Call], verdict: Verdict) -> dict[str, int]:
    """Return the counts of a history and of its check."""
    calls = [call for call in calls if call.rpc != "failover"]
    claims = [call for call in calls if call.rpc == "claim"]
    claimed = [call for call in claims if call.outcome == "CLAIMED"]
    won = [call for call in claimed if not call.replayed]
    stored = {(call.transaction_id, call.token) for call in won}
    doubtful = {(call.transaction_id, call.token) for call in claims if call.applied == "unknown"}
    outcomes = Counter(call.outcome for call in calls)
    per_id = Counter(call.transaction_id for call in calls).values()
    return {
        "calls": len(calls),
        "ids": len(per_id),
        "calls on an id, mean": round(len(calls) / max(1, len(per_id))),
        "calls on an id, most": max(per_id, default=0),
        "claims": len(claims),
        "claims in a batch": sum(call.batch > 0 for call in claims),
        "claims that may wait": sum(call.wait_ms > 0 for call in claims),
        "won": len(won),
        "won in a batch": sum(call.batch > 0 for call in won),
        "won after a wait": sum(call.wait_ms > 0 and call.end_ns - call.begin_ns > _WAITED_NS for call in won),
        "replays": len(claimed) - len(won),
        # Claims that only a later attempt reported as successful: without replays, nobody would do their work.
        "replays that saved": len(
            {(call.transaction_id, call.token) for call in claimed if call.replayed} & doubtful - stored
        ),
        "duplicates": outcomes["DUPLICATE"],
        "mismatches": outcomes["PAYLOAD_MISMATCH"],
        "completed": outcomes["COMPLETED"],
        "released": outcomes["RELEASED"],
        "extended": outcomes["EXTENDED"],
        "not held": outcomes["NOT_HELD"],
        "found": outcomes["FOUND"],
        "not found": outcomes["NOT_FOUND"],
        "unknown": sum(call.applied == "unknown" for call in calls),
        "certainly not applied": sum(call.applied == "no" for call in calls),
        "excused by a failover": verdict.excused,
        "steps of the search": verdict.steps,
        "steps on an id, most": verdict.most_steps,
        "undecided": sum(finding.kind == UNDECIDED for finding in verdict.findings),
    }


def errors_of(calls: Sequence[Call]) -> dict[str, int]:
    """Return the count of each error, the most frequent first."""
    errors = (f"{call.code} {call.reason or '(no reason)'} applied={call.applied}" for call in calls if call.code)
    return dict(Counter(errors).most_common())


# Longer than an answer takes without waiting.
_WAITED_NS = 50_000_000
