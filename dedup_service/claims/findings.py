"""Findings of a store examination: one for each check, with its remedy."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """Weight of a finding. WARNING: claims may be lost in an incident. CRITICAL: they will be lost, or are refused."""

    OK = 0
    INFO = 1
    WARNING = 2
    CRITICAL = 3

    @property
    def word(self) -> str:
        """The stable word for machines."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: a stable `check` name, a `message`, and a `remedy` where there is something to do.

    Neither text contains a secret.
    """

    check: str
    severity: Severity
    message: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the fields of the log line and of the JSON output."""
        return {"check": self.check, "severity": self.severity.word, "message": self.message, "remedy": self.remedy}


def worst(findings: Iterable[Finding]) -> Severity:
    """Return the highest severity; OK without findings."""
    return max((finding.severity for finding in findings), default=Severity.OK)
