"""The report: Markdown tables from results, and their place between the markers of a page of the documentation.

A page names each table by `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; what stands between them is rewritten. Any
script that measures can put its own tables there.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import plan, plots
from benchmarks.figures import Spread, spread
from benchmarks.plan import DIRECT, DIRECT_CLIENT
from benchmarks.results import Cell, Results

# What the tables of one concurrency show, where it was measured.
TYPICAL_CALLERS = 64


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, its first column to the left and all others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(value: float) -> str:
    """Return a figure with three significant digits, or as a whole number above them."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def with_range(found: Spread | None) -> str:
    """Return the median with the least and the greatest, or nothing where there is no figure."""
    return "" if found is None else f"{number(found.median)} [{number(found.low)}…{number(found.high)}]"


def callers_shown(results: Results) -> int:
    """Return the concurrency of the tables that show one: 64, or the greatest below it that was measured."""
    measured = sorted({cell.concurrency for cell in results.cells})
    return max((each for each in measured if each <= TYPICAL_CALLERS), default=measured[0])


def _name(cell: Cell) -> str:
    return f"{cell.server}: {plan.WORKLOADS.get(cell.workload, cell.workload)}"


def _direct(results: Results, concurrency: int) -> Cell | None:
    return results.cell(DIRECT, "set", concurrency, DIRECT_CLIENT)


def _ratio(cell: Cell, base: Cell | None) -> str:
    return "" if base is None or base is cell else with_range(cell.ratio(base))


def detail(results: Results, cells: Iterable[Cell]) -> str:
    """Return every figure of these cells; latencies and CPU are medians over the rounds."""
    header = ["server: workload", "load by", "callers", "a second", "of the no-op", "of redis-py"]
    rows = []
    for cell in cells:
        spreads = [cell.spread(figure) for figure in ("p50_us", "p99_us", "p999_us", "cpu_us")]
        middle = ["" if found is None else number(found.median) for found in spreads]
        ratios = [_ratio(cell, results.base_of(cell)), _ratio(cell, _direct(results, cell.concurrency))]
        throughput = with_range(cell.spread("throughput"))
        rows.append([_name(cell), cell.loader, f"{cell.concurrency}", throughput, *ratios, *middle])
    return table([*header, "p50 µs", "p99 µs", "p99.9 µs", "CPU µs"], rows)


def _typical(results: Results) -> str:
    callers = callers_shown(results)
    # Batches end at fewer callers.
    few = max((cell.concurrency for cell in results.cells if cell.workload == "batch"), default=0)
    shown = [c for c in results.cells if c.concurrency == (min(callers, few) if c.workload == "batch" else callers)]
    order = [each.server for each in results.servers] + [DIRECT]
    return detail(results, sorted(shown, key=lambda cell: order.index(cell.server)))


def _by_callers(results: Results) -> str:
    measured = sorted({cell.concurrency for cell in results.cells})
    paired = (cell for cell in results.cells if cell.workload != "noop" and results.base_of(cell) is not None)
    kinds = dict.fromkeys((cell.server, cell.workload, cell.loader) for cell in paired)
    rows = []
    for server, workload, loader in kinds:
        row = [f"{server}: {plan.WORKLOADS[workload]}"]
        for callers in measured:
            cell = results.cell(server, workload, callers, loader)
            row.append("" if cell is None else _ratio(cell, results.base_of(cell)))
        rows.append(row)
    return table(["of the no-op, at", *(f"{callers} callers" for callers in measured)], rows)


def _redis(results: Results) -> str:
    measured = sorted({cell.concurrency for cell in results.cells})
    rows = []
    for client in dict.fromkeys(cell.loader for cell in results.cells if cell.server == DIRECT):
        cells = [results.cell(DIRECT, "set", callers, client) for callers in measured]
        rows.append([client, *("" if cell is None else with_range(cell.spread("throughput")) for cell in cells)])
    if results.redis_benchmark:
        rates = (results.redis_benchmark.get(str(callers)) for callers in measured)
        rows.append(["redis-benchmark", *("" if each is None else with_range(spread(each)) for each in rates)])
    return table(["claims a second, at", *(f"{callers} callers" for callers in measured)], rows)


def _servers(results: Results) -> str:
    rows = []
    for each in results.servers:
        twice = f"{each.double_claims} of {each.claims_checked}" if each.claims_checked else ""
        rows.append([each.server, with_range(spread(each.start_ms)), number(each.peak_kib / 1024), twice])
    return table(["server", "start to listening, ms", "peak MiB", "ids not CLAIMED exactly once"], rows)


def _machine(results: Results) -> str:
    rows = [[name, str(value)] for name, value in (results.machine | results.settings).items()]
    return table(["", ""], rows) + "".join(f"\nNot measured: {each}.\n" for each in results.skipped)


def sections(results: Results) -> dict[str, str]:
    """Return every table by the name of its marker."""
    return {
        "machine": _machine(results),
        "typical": _typical(results),
        "by-callers": _by_callers(results),
        "redis": _redis(results),
        "servers": _servers(results),
    }


def write(results: Results, folder: Path, json_path: Path | None = None) -> None:
    """Write results.json, report.md and the plots into a folder, and the JSON also to a path of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results.to_json(), separators=(",", ":")) + "\n"
    # One line for each cell, so that a change of the figures reads as one.
    text = text.replace('{"server"', '\n{"server"')
    for path in (folder / "results.json", *([json_path] if json_path else [])):
        path.write_text(text)
    pictures = "".join(f"![{path.stem}]({path.name})\n" for path in plots.draw(results, folder))
    tables = [*sections(results).values(), detail(results, (c for c in results.cells if c.server != DIRECT))]
    (folder / "report.md").write_text("# Figures of one run\n\n" + "\n".join([*tables, pictures]))


def update_docs(page: Path, tables: Mapping[str, str]) -> None:
    """Write each table between its markers on the page; raise ValueError when the page has no such place."""
    text = page.read_text()
    for name, content in tables.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{page} has no place for the table {name!r}: add {begin} and {end}")
        text = f"{before}{begin}\n{content}{end}{after}"
    page.write_text(text)
