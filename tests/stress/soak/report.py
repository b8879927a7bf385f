"""The report of a soak, as text and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.stress.soak.calls import Tally
from tests.stress.soak.samples import Sample
from tests.stress.soak.verdict import JUDGED_CALLS, MAX_BYTES_A_CALL, Verdict

_ROWS = 10


@dataclass(frozen=True)
class Report:
    """The result of one soak."""

    engine: str
    seed: int
    tally: Tally
    restarts: int
    samples: Sequence[Sample]
    """From before the load to after it."""
    verdict: Verdict
    log_errors: Sequence[str]
    """Log lines of level error."""
    unsent: int
    """Number of answers whose caller had gone before they were sent. grpcio logs each as an error."""

    @property
    def not_shown(self) -> list[str]:
        """Events that never happened, so that the soak proves nothing about them."""
        wanted = ("CLAIMED", "DUPLICATE", "COMPLETED", "RELEASED", "EXTENDED", "cancelled by the caller")
        return [name for name in wanted if not self.tally.answers[name]]

    @property
    def passed(self) -> bool:
        """Whether every answer was right, resource use stayed flat, and enough happened to prove it."""
        return not (self.tally.answers["wrong"] or self.verdict.findings or self.log_errors or self.not_shown)

    def as_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "passed": self.passed,
            "engine": self.engine,
            "seed": self.seed,
            "calls": self.tally.tries,
            "scenarios": dict(self.tally.scenarios),
            "answers": dict(self.tally.answers.most_common()),
            "wrong": self.tally.wrong,
            "redis_restarts": self.restarts,
            "verdict": asdict(self.verdict) | {"allowed_bytes_a_call": MAX_BYTES_A_CALL},
            "log_errors": list(self.log_errors),
            "unsent": self.unsent,
            "showed_nothing_of": self.not_shown,
            "samples": [asdict(sample) for sample in self.samples],
        }

    def __str__(self) -> str:
        lines = [f"{self.engine}, seed {self.seed}: {self.tally.tries:,} calls, {self.restarts} restarts of Redis", ""]
        lines += [f"  {number:9,}  {answer}" for answer, number in self.tally.answers.most_common()]
        lines += ["", "  seconds    calls    memory  descriptors  threads  Redis connections"]
        step = -(-len(self.samples) // _ROWS)
        for sample in [*self.samples[:-1:step], self.samples[-1]]:
            connections = "down" if sample.redis_connections is None else sample.redis_connections
            lines.append(
                f"  {sample.seconds:7.0f} {sample.calls:8,} {sample.rss_bytes / 2**20:5.1f} MiB"
                f" {sample.file_descriptors:12} {sample.threads:8} {connections:>18}"
            )
        lines += ["", self._memory(), *self.verdict.findings]
        lines += [f"wrong: {sentence}" for sentence in self.tally.wrong]
        if self.unsent:
            lines.append(f"{self.unsent} answers were not sent because their caller had gone")
        lines += [f"the service logged: {error}" for error in self.log_errors]
        if self.not_shown:
            lines.append(f"inconclusive, never happened: {', '.join(self.not_shown)}")
        lines.append("passed" if self.passed else "FAILED")
        return "\n".join(lines)

    def _memory(self) -> str:
        slope = self.verdict.bytes_a_call
        grows = "no slope" if slope is None else f"{slope:+.1f} bytes a call in the second half"
        if self.verdict.judged:
            return f"memory: {grows}; the limit is {MAX_BYTES_A_CALL:.0f}"
        return f"memory: {grows}; not judged, which takes {JUDGED_CALLS:,} calls in the second half"
