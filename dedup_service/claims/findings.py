"""What an examination of a store says: one finding a check, each with what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """How much a finding matters: a warning may lose claims in a bad moment, a critical one will, or refuses them."""

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
    """One thing that was checked.

    `check` is a stable word for machines, `message` says what was found and what can go wrong, and `remedy` the line to
    change; it is empty where there is nothing to do. None of them holds a secret.
    """

    check: str
    severity: Severity
    message: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the finding as logs and JSON have it."""
        return {"check": self.check, "severity": self.severity.word, "message": self.message, "remedy": self.remedy}


def worst(findings: Iterable[Finding]) -> Severity:
    """Return the severity of the worst finding; OK when there is none."""
    return max((finding.severity for finding in findings), default=Severity.OK)
