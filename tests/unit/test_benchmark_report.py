"""The arithmetic and the tables of the published figures."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import report
from benchmarks.load import frame, parse_h2load
from benchmarks.publishing import ROOT, update_docs
from benchmarks.results import (
    Cell,
    Load,
    Results,
    Round,
    ServerFigures,
    Spread,
    paired_ratios,
    percentile,
    spread,
)
from benchmarks.servers import CannotMeasure

NOOP = "no-op, grpcio"
SERVICE = "service, grpcio, redis-tcp"

H2LOAD_OUTPUT = """\
finished in 1.00s, 3.00 req/s, 848.70KB/s
requests: 3 total, 7 started, 3 done, 3 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 3 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 848.70KB (869069) total, 40.62KB (41592) headers (space savings 96.27%), 67.21KB ({data}) data
"""
H2LOAD_LOG = "1000000\t200\t300\n1000100\t200\t100\n1000200\t200\t999800\n"


def a_round(throughput: float, cpu_us: float = 100.0) -> Round:
    """Return a round with this throughput."""
    return Round(throughput, 1_000, 2_000, 3_000, cpu_us)


def some_results() -> Results:
    """Return three rounds of one no-op and one service; the machine runs at half speed in the second."""
    noop = Cell(NOOP, "noop", "h2load", 16, NOOP, [a_round(10_000), a_round(5_000), a_round(10_000)])
    hot = Cell(SERVICE, "hot", "h2load", 16, NOOP, [a_round(5_000), a_round(2_000), a_round(6_000)])
    direct = Cell("Redis directly", "set", "redis-py asyncio", 16, "", [a_round(20_000) for _ in range(3)])
    servers = [ServerFigures(NOOP, [500.0], 51_200), ServerFigures(SERVICE, [700.0, 900.0], 81_920, 0, 200)]
    return Results({"CPU": "x"}, {"rounds": 3}, [noop, hot, direct], servers, {"16": [50_000.0]}, ["native: not here"])


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 500), (99, 990), (99.9, 999), (100, 1_000), (0.01, 1), (99.91, 1_000)]
)
def test_percentile_is_the_nearest_rank(percent: float, expected: int) -> None:
    """A percentile of the numbers 1 to 1,000 equals its rank."""
    assert percentile(range(1, 1_001), percent) == expected


def test_percentile_is_exact_where_floating_point_is_not() -> None:
    """A rounding error does not select the next rank."""
    assert percentile(range(1, 41_001), 99.9) == 40_959


@given(st.lists(st.integers(0, 10**9), min_size=1).map(sorted), st.floats(0.1, 100))
def test_percentile_is_a_value_and_covers_its_share(values: list[int], percent: float) -> None:
    """A percentile is one of the values, and at least its share of the values does not exceed it."""
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - 1e-6


@pytest.mark.parametrize("call", [lambda: percentile([], 50), lambda: spread([])])
def test_no_values_are_an_error(call: object) -> None:
    """Without values there is no figure."""
    with pytest.raises(ValueError, match="nothing was measured"):
        call()  # type: ignore[operator]


def test_ratios_are_paired_by_round() -> None:
    """A slow machine in one round does not change the ratio of this round."""
    assert paired_ratios([50.0, 5.0, 60.0], [100.0, 10.0, 100.0]) == Spread(0.5, 0.5, 0.6)


def test_different_numbers_of_rounds_are_an_error() -> None:
    """Rounds without a partner have no ratio."""
    with pytest.raises(ValueError, match="2 rounds cannot be paired with 1"):
        paired_ratios([1.0, 2.0], [1.0])


def test_a_base_of_zero_is_an_error() -> None:
    """A no-op without answers has no ratio."""
    with pytest.raises(ValueError, match="did not reach"):
        paired_ratios([1.0], [0.0])


def test_a_batch_counts_by_its_claims() -> None:
    """Throughput and CPU of a batch are per claim, its latency per call."""
    found = Round.of(Load(2.0, [10, 20, 30, 40]), cpu_s=0.004, claims_a_call=100)
    assert (found.throughput, found.cpu_us, found.p50_us) == (200.0, 10.0, 20)


@pytest.mark.parametrize(
    ("calls", "p99", "p999"), [(99, None, None), (100, 99, None), (999, 990, None), (1_000, 990, 999)]
)
def test_few_calls_have_no_high_percentile(calls: int, p99: int | None, p999: int | None) -> None:
    """With too few calls, the slowest call is not reported as a high percentile."""
    found = Round.of(Load(1.0, list(range(1, calls + 1))), cpu_s=0.1)
    assert (found.p99_us, found.p999_us) == (p99, p999)
    cell = Cell(NOOP, "noop", "h2load", 1, NOOP, [found])
    assert (cell.spread("p999_us") is None) == (p999 is None)


def test_a_message_is_framed_as_grpc_does_it() -> None:
    """A flag for no compression and the length precede the message."""
    assert frame(b"abc") == b"\x00\x00\x00\x00\x03abc"


def test_h2load_is_read() -> None:
    """Latencies come from the log; the duration is from the first request to the last answer."""
    found = parse_h2load(H2LOAD_OUTPUT.format(data=45), H2LOAD_LOG, answer_bytes=10, concurrency=4)
    assert found == Load(1.0, [100, 300, 999_800])


@pytest.mark.parametrize(("data", "wrong"), [(44, 3), (45, 0), (105, 0), (106, 3), (30, 3)])
def test_answers_of_another_length_are_wrong(data: int, wrong: int) -> None:
    """Fewer bytes mean failed calls; more mean other outcomes, apart from calls in flight at the end."""
    found = parse_h2load(H2LOAD_OUTPUT.format(data=data), H2LOAD_LOG, answer_bytes=10, concurrency=4)
    assert found.wrong == wrong
    assert bool(found.first_bad) == bool(wrong)


@pytest.mark.parametrize(
    ("output", "log"),
    [
        ("Usage: h2load", H2LOAD_LOG),
        (H2LOAD_OUTPUT.format(data=45), ""),
        (H2LOAD_OUTPUT.format(data=45), H2LOAD_LOG * 2),
    ],
)
def test_unexpected_output_of_h2load_is_an_error(output: str, log: str) -> None:
    """Other output, an empty log, and a log with requests of another run."""
    with pytest.raises(CannotMeasure):
        parse_h2load(output, log, answer_bytes=10, concurrency=4)


def test_results_survive_their_file(tmp_path: Path) -> None:
    """Reading the JSON file returns the same results."""
    report.write(some_results(), tmp_path)
    assert Results.from_json(json.loads((tmp_path / "results.json").read_text())) == some_results()


def test_results_of_another_format_are_an_error() -> None:
    """A file of an older version is not misread."""
    with pytest.raises(ValueError, match="format 0"):
        Results.from_json(some_results().to_json() | {"format": 0})


def test_the_same_results_make_the_same_report(tmp_path: Path) -> None:
    """Tables and plots depend on the results only, so a diff shows changed figures."""
    for name in ("one", "two"):
        report.write(some_results(), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["cpu.svg", "latency-p99.svg", "report.md", "results.json", "throughput.svg"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_tables_show_the_paired_ratios() -> None:
    """Ratios are the median over the rounds, with minimum and maximum."""
    tables = report.sections(some_results())
    assert "| service, grpcio, redis-tcp: claims of one hot id | 0.50 [0.40…0.60] |" in tables["by-callers"]
    assert (
        "5,000 [2,000…6,000] | 0.50 [0.40…0.60] | 0.25 [0.10…0.30] | 1,000 | 2,000 | 3,000 | 100 |" in tables["typical"]
    )
    assert "| service, grpcio, redis-tcp | 800 [700…900] | 80.0 | 0 of 200 |" in tables["servers"]
    assert "| redis-benchmark | 50,000 [50,000…50,000] |" in tables["redis"]
    assert "Not measured: native: not here." in tables["machine"]


def test_tables_are_written_between_the_marks(tmp_path: Path) -> None:
    """Only the text between the marks is rewritten, and repeatably."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:a -->\nold\n<!-- /bench:a -->\nafter\n")
    for _ in range(2):
        update_docs(page, {"a": "| new |\n"})
    assert page.read_text() == "before\n<!-- bench:a -->\n| new |\n<!-- /bench:a -->\nafter\n"


def test_a_page_without_the_marks_is_an_error(tmp_path: Path) -> None:
    """A table without marks in the page is not dropped silently."""
    page = tmp_path / "page.md"
    page.write_text("<!-- bench:a -->\n")
    with pytest.raises(ValueError, match="no marks for the table 'a'"):
        update_docs(page, {"a": "x"})


def test_the_performance_page_omits_rows_that_the_report_has() -> None:
    """The page has marks for each of its tables, and rows like its others stay in the report."""
    page = (ROOT / "docs" / "performance.md").read_text()
    tables = report.page_sections(some_results())
    assert all(f"<!-- bench:{name} -->" in page for name in tables)
    assert "redis-tcp: claims of one hot id" in tables["typical"]
    omitted = Results.from_json(json.loads((ROOT / "benchmarks/results/results.json").read_text()))
    assert "redis-unix" in report.sections(omitted)["typical"]
    assert "redis-unix" not in report.page_sections(omitted)["typical"]


def test_wrong_answers_are_reported() -> None:
    """Wrong answers, failed calls and double claims are named."""
    results = some_results()
    results.cells[1].rounds[2] = Round(1.0, 1, 1, 1, 1.0, wrong=3, failed=2)
    results.servers[1].double_claims = 7
    assert list(results.bad_answers()) == [
        "service, grpcio, redis-tcp: 7 of 200 ids not CLAIMED exactly once",
        "service, grpcio, redis-tcp, hot, 16 callers, round 3: 3 wrong answers, 2 failed calls",
    ]
