"""The main benchmark's report: Markdown tables, and SVG plots that depend on the results only."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.publishing import number, table, with_range
from benchmarks.results import Cell, Results, spread
from benchmarks.rounds import DIRECT, DIRECT_CLIENT, WORKLOADS

# Set before importing pyplot: no window, text as text, reproducible ids.
mpl.use("svg")
mpl.rcParams.update(
    {
        "svg.hashsalt": "dedup",
        "svg.fonttype": "none",
        "figure.figsize": (7.0, 4.0),
        "axes.grid": True,
        "axes.axisbelow": True,
    }
)

from matplotlib import pyplot as plt  # noqa: E402 - as above

# For tables that show one concurrency.
TYPICAL_CALLERS = 64
_PLOTTED = ("hot", "noop", "set")


def callers_shown(results: Results) -> int:
    """Return the concurrency such tables show: the greatest measured up to 64, else the smallest."""
    measured = sorted({cell.concurrency for cell in results.cells})
    return max((each for each in measured if each <= TYPICAL_CALLERS), default=measured[0])


def _name(cell: Cell) -> str:
    return f"{cell.server}: {WORKLOADS.get(cell.workload, cell.workload)}"


def _direct_cell(results: Results, concurrency: int) -> Cell | None:
    return results.cell(DIRECT, "set", concurrency, DIRECT_CLIENT)


def _ratio(cell: Cell, base: Cell | None) -> str:
    return "" if base is None or base is cell else with_range(cell.ratio(base))


def detail(results: Results, cells: Iterable[Cell]) -> str:
    """Return the table of these cells: medians of latencies and CPU over the rounds."""
    header = ["server: workload", "load by", "callers", "a second", "of the no-op", "of redis-py"]
    rows = []
    for cell in cells:
        spreads = [cell.spread(figure) for figure in ("p50_us", "p99_us", "p999_us", "cpu_us")]
        middle = ["" if found is None else number(found.median) for found in spreads]
        ratios = [_ratio(cell, results.base_of(cell)), _ratio(cell, _direct_cell(results, cell.concurrency))]
        throughput = with_range(cell.spread("throughput"))
        rows.append([_name(cell), cell.loader, f"{cell.concurrency}", throughput, *ratios, *middle])
    return table([*header, "p50 µs", "p99 µs", "p99.9 µs", "CPU µs"], rows)


def _typical(results: Results, omitted: tuple[str, ...] = ()) -> str:
    callers = callers_shown(results)
    # Only batches have fewer callers.
    few = max((cell.concurrency for cell in results.cells if cell.workload == "batch"), default=0)
    shown = [c for c in results.cells if c.concurrency == (min(callers, few) if c.workload == "batch" else callers)]
    shown = [cell for cell in shown if not any(part in _name(cell) for part in omitted)]
    order = [each.server for each in results.servers] + [DIRECT]
    return detail(results, sorted(shown, key=lambda cell: order.index(cell.server)))


def _by_callers(results: Results) -> str:
    measured = sorted({cell.concurrency for cell in results.cells})
    paired = (cell for cell in results.cells if cell.workload != "noop" and results.base_of(cell) is not None)
    kinds = dict.fromkeys((cell.server, cell.workload, cell.loader) for cell in paired)
    rows = []
    for server, workload, loader in kinds:
        row = [f"{server}: {WORKLOADS[workload]}"]
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
    """Return the tables by their mark."""
    return {
        "machine": _machine(results),
        "typical": _typical(results),
        "by-callers": _by_callers(results),
        "redis": _redis(results),
        "servers": _servers(results),
    }


def page_sections(results: Results) -> dict[str, str]:
    """Return the tables of docs/performance.md."""
    return {
        "machine": _machine(results),
        "typical": _typical(results, omitted=("redis-unix", "retries with one token", "get-then-set")),
        "servers": _servers(results),
    }


def write(results: Results, folder: Path, json_path: Path | None = None) -> None:
    """Write results.json, report.md and plots into a folder, and the JSON to `json_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results.to_json(), separators=(",", ":")) + "\n"
    # Readable diffs.
    text = text.replace('{"server"', '\n{"server"')
    for path in (folder / "results.json", *([json_path] if json_path else [])):
        path.write_text(text)
    pictures = "".join(f"![{path.stem}]({path.name})\n" for path in draw(results, folder))
    tables = [*sections(results).values(), detail(results, (c for c in results.cells if c.server != DIRECT))]
    (folder / "report.md").write_text("# Figures of one run\n\n" + "\n".join([*tables, pictures]))


def draw(results: Results, folder: Path) -> Iterator[Path]:
    """Draw the plots, and yield their files."""
    yield _lines(results, folder / "throughput.svg", "throughput", "calls a second", scale="linear")
    yield _lines(results, folder / "latency-p99.svg", "p99_us", "p99 in µs", scale="log")
    yield _cpu(results, folder / "cpu.svg")


def _lines(results: Results, path: Path, figure: str, label: str, *, scale: str) -> Path:
    picture, axes = plt.subplots()
    kinds = dict.fromkeys((c.server, c.workload, c.loader) for c in results.cells if c.workload in _PLOTTED)
    for server, workload, loader in kinds:
        if workload == "noop" and loader != "h2load":
            continue
        cells = [c for c in results.cells if (c.server, c.workload, c.loader) == (server, workload, loader)]
        points = [(cell.concurrency, found) for cell in cells if (found := cell.spread(figure)) is not None]
        callers, middles = [callers for callers, _ in points], [found.median for _, found in points]
        below = [found.median - found.low for _, found in points]
        above = [found.high - found.median for _, found in points]
        name = loader if server == DIRECT else server
        dashes = "--" if workload == "noop" else "-"
        axes.errorbar(callers, middles, [below, above], marker=".", ls=dashes, label=name, capsize=2)
    measured = sorted({cell.concurrency for cell in results.cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(measured, [str(callers) for callers in measured])
    axes.set_yscale(scale)
    if scale == "linear":
        axes.set_ylim(bottom=0)
    axes.set_xlabel("callers")
    axes.set_ylabel(label)
    axes.set_title(
        "One hot id, the no-op rpc, and SET NX by redis-py: median, minimum and maximum over the rounds", fontsize=9
    )
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(picture, path)


def _cpu(results: Results, path: Path) -> Path:
    callers = max(c.concurrency for c in results.cells if c.concurrency <= 64)
    cells = [c for c in results.cells if c.concurrency == callers and c.workload in {*_PLOTTED, "fresh"}]
    cells = [c for c in cells if not (c.workload == "noop" and c.loader != "h2load")][::-1]
    picture, axes = plt.subplots(figsize=(7.0, 1 + len(cells) * 0.25))
    spreads = [spread([each.cpu_us for each in cell.rounds]) for cell in cells]
    axes.barh([_label(cell) for cell in cells], [found.median for found in spreads], height=0.6)
    axes.tick_params(labelsize=7)
    axes.set_xlabel(f"CPU of the server in µs a call, at {callers} callers (without a service: CPU of redis-py)")
    return _save(picture, path)


def _label(cell: Cell) -> str:
    return cell.loader if cell.server == DIRECT else f"{cell.server}: {cell.workload}"


def _save(picture: Figure, path: Path) -> Path:
    picture.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(picture)
    # matplotlib leaves trailing spaces.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path
