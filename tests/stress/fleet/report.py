"""The report of a run: counts, findings, and whether enough happened for a run without findings to count."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.stress.fleet.check import KEPT_DONE, KEPT_NOT_DONE, ONCE, Finding, Verdict
from tests.stress.fleet.history import ANSWERED, BROKEN, CUT, FAILING, LONG, SHORT, Attempt, History

_WANTED = (
    "replies lost",
    "cut by the route",
    "broken by a kill",
    "refused with 409",
    "refused with 503",
    "failed with 500",
)
# A run whose keys were mostly left in doubt would show little.
_LEAST_SHARE_DONE = 0.6


@dataclass(frozen=True)
class Report:
    """The result of one run."""

    seed: int
    seconds: float
    numbers: dict[str, int]
    ran: dict[str, int]
    """The rows that each service made."""
    faults: dict[str, int]
    findings: list[Finding]
    not_shown: list[str]
    """What never happened, so that the run proves nothing about it."""
    not_run: list[str]
    """The services whose tool is missing."""
    history: str
    """The folder of the history and the logs, kept if there are findings."""

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "numbers": self.numbers,
            "ran": self.ran,
            "faults": self.faults,
            "violations": [str(finding) for finding in self.findings],
            "showed_nothing_of": self.not_shown,
            "not_run": self.not_run,
            "history": self.history if self.findings else None,
        }

    def __str__(self) -> str:
        lines = [f"mixed fleet, seed {self.seed}, {self.seconds:.0f} s"]
        for title, numbers in (
            ("keys and attempts", self.numbers),
            ("work done by", self.ran),
            ("faults", self.faults),
        ):
            lines += ["", title, *(f"  {number:6,}  {name}" for name, number in numbers.items())]
        kinds = Counter(finding.kind for finding in self.findings)
        lines += ["", f"violations: {len(self.findings)} {dict(kinds) if kinds else ''}".rstrip()]
        seen: Counter[str] = Counter()
        for finding in self.findings:
            seen[finding.kind] += 1
            if seen[finding.kind] <= 2:
                lines += ["", str(finding)]
        if self.findings:
            lines += ["", f"history: {self.history}"]
        if self.not_shown:
            lines += ["", f"inconclusive, never happened: {', '.join(self.not_shown)}"]
        if self.not_run:
            lines += ["", f"NOT TESTED, their tool is missing: {', '.join(self.not_run)}"]
        return "\n".join(lines)


def count(history: History, verdict: Verdict) -> tuple[dict[str, int], dict[str, int], dict[str, int], list[str]]:
    """Return the counts of a history, the rows of each service, the faults, and what was not shown."""
    attempts = history.attempts
    answered = [one for one in attempts if one.ending == ANSWERED]
    fates = Counter(verdict.fates.values())
    kinds = Counter(history.keys.values())
    per_key = Counter(one.key for one in attempts).values()
    numbers = {
        "keys": len(history.keys),
        "keys discarded after a stall": len(history.discarded),
        **{f"keys with {kind}": kinds[kind] for kind in (SHORT, FAILING, LONG)},
        **{fate: fates[fate] for fate in (ONCE, KEPT_DONE, KEPT_NOT_DONE)},
        f"{ONCE}, no attempt in doubt": sum(
            fate == ONCE and not verdict.doubts[key] for key, fate in verdict.fates.items()
        ),
        "attempts": len(attempts),
        "attempts on a key, most": max(per_key, default=0),
        "replays": sum(one.succeeded and one.replayed for one in answered),
        "replies lost": sum(one.lost for one in answered),
        "cut by the route": sum(one.ending == CUT for one in attempts),
        "broken by a kill": sum(one.ending == BROKEN for one in attempts),
        "refused with 409": sum(one.status == 409 for one in answered),
        "refused with 503": sum(one.status == 503 for one in answered),
        "failed with 500": sum(one.status == 500 for one in answered),
    }
    ran = Counter(row.paid_by for row in history.rows)
    faults = Counter(one.kind for one in history.disturbances)
    return (
        numbers,
        {name: ran[name] for name in history.services},
        dict(sorted(faults.items())),
        [*_missing(history, numbers, answered)],
    )


def _missing(history: History, numbers: dict[str, int], answered: Sequence[Attempt]) -> list[str]:
    kinds = set(history.keys.values())
    wanted = _WANTED if SHORT in kinds else ()
    missing = [name for name in wanted if not numbers[name]]
    if numbers[ONCE] < _LEAST_SHARE_DONE * numbers["keys"]:
        missing.append(f"{_LEAST_SHARE_DONE:.0%} of the keys done")
    first = {row.key: row.paid_by for row in history.rows}
    seen = {(first.get(one.key), one.service) for one in answered if one.succeeded and one.replayed}
    missing += [f"{b} replaying {a}" for a in history.services for b in history.services if (a, b) not in seen]
    if LONG in kinds:
        long = {first.get(key) for key, kind in history.keys.items() if kind == LONG}
        missing += [f"long work by {name}" for name in history.services if name not in long]
    return missing
