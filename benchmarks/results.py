"""A run's results, as in its JSON file, and the arithmetic: percentiles, spreads, paired ratios."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

FORMAT = 1


@dataclass(frozen=True)
class Spread:
    """One figure over all rounds."""

    median: float
    low: float
    high: float


def percentile(ordered: Sequence[int], percent: float) -> int:
    """Return the nearest-rank percentile of ascending values, always one of them.

    Raises ValueError for no values.
    """
    if not ordered:
        raise ValueError("no values: nothing was measured")
    # In floating point, 99.9 % of 41,000 exceeds 40,959 slightly, which would select the next rank.
    rank = math.ceil(round(len(ordered) * percent / 100, 6))
    return ordered[max(rank, 1) - 1]


def spread(values: Sequence[float]) -> Spread:
    """Return median, minimum and maximum. Raises ValueError for no values."""
    if not values:
        raise ValueError("no rounds: nothing was measured")
    return Spread(statistics.median(values), min(values), max(values))


def paired_ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the spread of each round's ratio to the base of the same round.

    Pairing cancels the machine's changing speed. Raises ValueError for different numbers of rounds, or a base of zero.
    """
    if len(values) != len(base):
        raise ValueError(f"{len(values)} rounds cannot be paired with {len(base)}: use results of one run")
    if not all(base):
        raise ValueError("a base is zero: the load generator did not reach its server")
    return spread([value / under for value, under in zip(values, base, strict=True)])


@dataclass(frozen=True)
class Load:
    """A load generator's measurements: ascending latencies in microseconds, one per answered call."""

    seconds: float
    latencies_us: list[int]
    wrong: int = 0
    failed: int = 0
    first_bad: str = ""

    @property
    def calls(self) -> int:
        """The number of answered calls."""
        return len(self.latencies_us)


@dataclass(frozen=True)
class Round:
    """The figures of one cell in one round.

    CPU is the measured server's. p99 is None below 100 calls and p99.9 below 1,000, where it would be the slowest call.
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
        """Return the figures of a load: throughput and CPU per claim, latencies per call."""
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
        """Return a figure's spread over the rounds, or None if a round lacks it."""
        values = [getattr(each, figure) for each in self.rounds]
        return None if None in values else spread(values)

    def ratio(self, other: "Cell", figure: str = "throughput") -> Spread:
        """Return the ratio of a figure to the other cell's, paired by rounds."""
        return paired_ratios(
            [getattr(each, figure) for each in self.rounds], [getattr(each, figure) for each in other.rounds]
        )


@dataclass
class ServerFigures:
    """One server over the whole run: the time of each start until it listens, and peak resident memory."""

    server: str
    start_ms: list[float] = field(default_factory=list)
    peak_kib: int = 0
    double_claims: int = 0
    claims_checked: int = 0


@dataclass
class Results:
    """The results of one run."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    cells: list[Cell] = field(default_factory=list)
    servers: list[ServerFigures] = field(default_factory=list)
    # Requests per second, by number of connections.
    redis_benchmark: dict[str, list[float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    format: int = FORMAT

    def cell(self, server: str, workload: str, concurrency: int, loader: str | None = None) -> Cell | None:
        """Return a cell, None if not measured."""
        for cell in self.cells:
            if (cell.server, cell.workload, cell.concurrency) == (server, workload, concurrency) and loader in {
                None,
                cell.loader,
            }:
                return cell
        return None

    def base_of(self, cell: Cell) -> Cell | None:
        """Return the no-op cell with the same engine, concurrency and load generator."""
        return self.cell(cell.base, "noop", cell.concurrency, cell.loader)

    def bad_answers(self) -> Iterator[str]:
        """Yield a sentence per service with a double claim, and per round with wrong answers or failed calls."""
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
        """Return the results file's JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """Return the results of a JSON object. Raises ValueError for another format."""
        if found.get("format") != FORMAT:
            raise ValueError(
                f"results of format {found.get('format')}; only format {FORMAT} is supported: measure again"
            )
        cells = [Cell(**(cell | {"rounds": [Round(**each) for each in cell["rounds"]]})) for cell in found["cells"]]
        servers = [ServerFigures(**server) for server in found["servers"]]
        return cls(**(found | {"cells": cells, "servers": servers}))
