"""The report of a run: counts, findings, and whether enough happened for a run without findings to count."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.stress.chaos.check import Finding
from tests.stress.chaos.history import Call


@dataclass(frozen=True)
class Report:
    """The result of one run."""

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
        wanted = {
            name: self.numbers[name] for name in ("won", "replays", "replays that saved", "duplicates", "unknown")
        }
        return [name for name, number in (wanted | self.faults).items() if number == 0]

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "seed": self.seed,
            "numbers": self.numbers,
            "errors": self.errors,
            "faults": self.faults,
            "violations": [str(finding) for finding in self.findings],
            "showed_nothing_of": self.not_shown,
            "history": self.history if self.findings else None,
        }

    def __str__(self) -> str:
        lines = [f"seed {self.seed}"]
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


def count(calls: Sequence[Call]) -> dict[str, int]:
    """Return the counts of a history."""
    claims = [call for call in calls if call.rpc == "claim"]
    claimed = [call for call in claims if call.outcome == "CLAIMED"]
    stored = {(call.transaction_id, call.token) for call in claimed if not call.replayed}
    doubtful = {(call.transaction_id, call.token) for call in claims if call.applied == "unknown"}
    return {
        "calls": len(calls),
        "claim attempts": len(claims),
        "transactions": len({call.transaction_id for call in calls}),
        "lives": len({(call.transaction_id, call.token) for call in claimed}),
        "won": len(claimed) - sum(call.replayed for call in claimed),
        "replays": sum(call.replayed for call in claimed),
        # Claims that only a later attempt reported as successful: without replays, nobody would do their work.
        "replays that saved": len(
            {(call.transaction_id, call.token) for call in claimed if call.replayed} & doubtful - stored
        ),
        "duplicates": sum(call.outcome == "DUPLICATE" for call in claims),
        "completed": sum(call.outcome == "COMPLETED" for call in calls),
        "released": sum(call.outcome == "RELEASED" for call in calls),
        "not held": sum(call.outcome == "NOT_HELD" for call in calls),
        "unknown": sum(call.applied == "unknown" for call in calls),
        "certainly not applied": sum(call.applied == "no" for call in calls),
    }


def errors_of(calls: Sequence[Call]) -> dict[str, int]:
    """Return the count of each error, the most frequent first."""
    errors = (f"{call.code} {call.reason or '(no reason)'} applied={call.applied}" for call in calls if call.code)
    return dict(Counter(errors).most_common())
