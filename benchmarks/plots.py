"""The plots of a report, as SVG files that are the same for the same results."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.figures import spread
from benchmarks.plan import DIRECT
from benchmarks.results import Cell, Results

# Chosen before pyplot is imported: no window. Text stays text, and the ids in the files are no random ones.
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

_SERIES = ("hot", "noop", "set")


def draw(results: Results, folder: Path) -> Iterator[Path]:
    """Draw each plot, and yield its file."""
    yield _lines(results, folder / "throughput.svg", "throughput", "calls a second", scale="linear")
    yield _lines(results, folder / "latency-p99.svg", "p99_us", "p99 in µs", scale="log")
    yield _cpu(results, folder / "cpu.svg")


def _lines(results: Results, path: Path, figure: str, label: str, *, scale: str) -> Path:
    picture, axes = plt.subplots()
    kinds = dict.fromkeys((c.server, c.workload, c.loader) for c in results.cells if c.workload in _SERIES)
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
    axes.set_title("One hot id, the no-op rpc, and SET NX by redis-py: median, least and greatest round", fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(picture, path)


def _cpu(results: Results, path: Path) -> Path:
    callers = max(c.concurrency for c in results.cells if c.concurrency <= 64)
    cells = [c for c in results.cells if c.concurrency == callers and c.workload in {*_SERIES, "fresh"}]
    cells = [c for c in cells if not (c.workload == "noop" and c.loader != "h2load")][::-1]
    picture, axes = plt.subplots(figsize=(7.0, 1 + len(cells) * 0.25))
    spreads = [spread([each.cpu_us for each in cell.rounds]) for cell in cells]
    axes.barh([_label(cell) for cell in cells], [found.median for found in spreads], height=0.6)
    axes.tick_params(labelsize=7)
    axes.set_xlabel(f"CPU of the server in µs a call, at {callers} callers (of redis-py itself where no service is)")
    return _save(picture, path)


def _label(cell: Cell) -> str:
    return cell.loader if cell.server == DIRECT else f"{cell.server}: {cell.workload}"


def _save(picture: Figure, path: Path) -> Path:
    picture.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(picture)
    # matplotlib ends lines with blanks, which git diff shows.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
    return path
