"""What a run found, as it stands in the JSON file: cells of figures, the servers, and the answers that were checked."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from benchmarks.figures import Spread, paired_ratios, percentile, spread

FORMAT = 1


@dataclass(frozen=True)
class Load:
    """What one load generator saw: latencies ascending in microseconds, one for each call that was answered."""

    seconds: float
    latencies_us: list[int]
    wrong: int = 0
    failed: int = 0
    first_bad: str = ""

    @property
    def calls(self) -> int:
        """How many calls were answered."""
        return len(self.latencies_us)


@dataclass(frozen=True)
class Round:
    """The figures of one cell in one round.

    CPU is that of the measured server alone. p99.9 of fewer than 1,000 calls, and p99 of fewer than 100, are None:
    they would be the slowest call under another name.
    """

    throughput: float
    p50_us: int
    p99_us: int | None
    p999_us: int | None
    cpu_us: float
    wrong: int = 0
    failed: int = 0

    @classmethod
    def of(cls, load: Load, *, cpu_s: float, claims_a_call: int = 1) -> Self:
        """Return the figures of one load: throughput and CPU are by the claim, latencies by the call."""
        claims = load.calls * claims_a_call
        return cls(
            throughput=round(claims / load.seconds, 1),
            p50_us=percentile(load.latencies_us, 50),
            p99_us=percentile(load.latencies_us, 99) if load.calls >= 100 else None,
            p999_us=percentile(load.latencies_us, 99.9) if load.calls >= 1_000 else None,
            cpu_us=round(cpu_s * 1e6 / claims, 2),
            wrong=load.wrong,
            failed=load.failed,
        )


@dataclass
class Cell:
    """One workload on one server at one concurrency, over all rounds."""

    server: str
    workload: str
    loader: str
    concurrency: int
    base: str
    rounds: list[Round] = field(default_factory=list)

    def spread(self, figure: str) -> Spread | None:
        """Return the spread of one figure over the rounds, or None when a round lacks it."""
        values = [getattr(each, figure) for each in self.rounds]
        return None if None in values else spread(values)

    def ratio(self, other: "Cell", figure: str = "throughput") -> Spread:
        """Return this cell's figure as a multiple of the other's, round by round."""
        return paired_ratios(
            [getattr(each, figure) for each in self.rounds], [getattr(each, figure) for each in other.rounds]
        )


@dataclass
class ServerFigures:
    """One server over the whole run: start to first answer for each start, and its peak resident memory."""

    server: str
    start_ms: list[float] = field(default_factory=list)
    peak_kib: int = 0
    double_claims: int = 0
    claims_checked: int = 0


@dataclass
class Results:
    """Everything that one run found."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    servers: list[ServerFigures] = field(default_factory=list)
    # What redis-benchmark, Redis' own client in C, does a second, by the number of its connections.
    redis_benchmark: dict[str, list[float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    format: int = FORMAT

    def cell(self, server: str, workload: str, concurrency: int, loader: str | None = None) -> Cell | None:
        """Return one cell, or None when it was not measured."""
        for cell in self.cells:
            if (cell.server, cell.workload, cell.concurrency) == (server, workload, concurrency) and loader in {
                None,
                cell.loader,
            }:
                return cell
        return None

    def base_of(self, cell: Cell) -> Cell | None:
        """Return the no-op that a cell is paired with: same engine, concurrency and load generator."""
        return self.cell(cell.base, "noop", cell.concurrency, cell.loader)

    def bad_answers(self) -> Iterator[str]:
        """Say for each cell what was wrong with its answers, and which service let a transaction in twice."""
        for server in self.servers:
            if server.double_claims and server.server.startswith("service"):
                yield f"{server.server}: {server.double_claims} of {server.claims_checked} ids not CLAIMED exactly once"
        for cell in self.cells:
            for number, each in enumerate(cell.rounds, 1):
                if each.wrong or each.failed:
                    yield (
                        f"{cell.server}, {cell.workload}, {cell.concurrency} callers, round {number}: "
                        f"{each.wrong} wrong answers, {each.failed} failed calls"
                    )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of the results file."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """Read the JSON object of a results file; raise ValueError for one of another format."""
        if found.get("format") != FORMAT:
            raise ValueError(f"results of format {found.get('format')}: this reads format {FORMAT}, measure anew")
        cells = [Cell(**(cell | {"rounds": [Round(**each) for each in cell["rounds"]]})) for cell in found["cells"]]
        servers = [ServerFigures(**server) for server in found["servers"]]
        return cls(**(found | {"cells": cells, "servers": servers}))
