#!/usr/bin/env python3
"""Draws the panels of the Grafana dashboard as one image, from Prometheus only: a preview without Grafana."""

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, DateFormatter

DASHBOARD = Path(__file__).parents[1] / "deploy" / "observability" / "dashboard.json"
# Inches of a cell of Grafana's grid, 24 cells wide.
_CELL = (0.75, 0.36)
_POINTS = 240
# Grafana's variables. The rate interval must span several scrapes.
_VARIABLES = {"$job": ".*", "$namespace": ".*", "$__rate_interval": "20s"}
_COLOURS = {"red": "#e24d42", "green": "#4f9d4f", "orange": "#ef843c", "blue": "#3f7fbf"}

Series = tuple[str, list[datetime], list[float]]


def main() -> None:
    """Query Prometheus for the dashboard, and write the image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--prometheus", default="http://127.0.0.1:9090", help="URL of Prometheus (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=60, help="length of the time range (default: %(default)s)")
    parser.add_argument(
        "--until", type=int, default=int(time.time()), help="end of the time range, in Unix seconds (default: now)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/dashboard.png"), help="image file (default: %(default)s)"
    )
    arguments = parser.parse_args()
    dashboard = json.loads(DASHBOARD.read_text())
    # Whole seconds, so that all series share timestamps.
    step = max(1, round(60 * arguments.minutes / _POINTS))
    span = range(arguments.until - step * _POINTS, arguments.until + 1, step)
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    plt.rcParams.update({"font.size": 7, "axes.titlesize": 8, "axes.grid": True, "grid.alpha": 0.3})
    figure = plt.figure(figsize=(24 * _CELL[0], (height + 1) * _CELL[1]))
    for panel in dashboard["panels"]:
        axes = figure.add_axes(_bounds(panel["gridPos"], height + 1))
        if panel["type"] == "row":
            axes.axis("off")
            axes.text(0, 0.2, panel["title"], fontsize=10, fontweight="bold")
        elif panel["type"] == "stat":
            _draw_number(axes, panel, _query(arguments.prometheus, panel, span))
        else:
            _draw_lines(axes, panel, _query(arguments.prometheus, panel, span), span)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=80)


def _bounds(grid: dict[str, int], height: int) -> tuple[float, float, float, float]:
    # Margins for a panel's title, axis and legend; a row has none.
    left, top, right, bottom = (0.9, 0.6, 0.2, 1.5) if grid["h"] > 1 else (0.3, 0.0, 0.0, 0.0)
    if grid["h"] == 4:
        bottom = 0.4
    x, y, width = grid["x"] + left, grid["y"] + top, grid["w"] - left - right
    tall = grid["h"] - top - bottom
    return x / 24, 1 - (y + tall + 0.5) / height, width / 24, tall / height


def _query(prometheus: str, panel: dict[str, Any], span: range) -> list[Series]:
    found: list[Series] = []
    for target in panel["targets"]:
        query = target["expr"]
        for variable, value in _VARIABLES.items():
            query = query.replace(variable, value)
        parameters = {"query": query, "start": span[0], "end": span[-1], "step": span.step}
        address = f"{prometheus}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=30) as reply:  # noqa: S310 - the operator's own Prometheus
            result = json.load(reply)["data"]["result"]
        found += [
            (
                _legend(target["legendFormat"], series["metric"]),
                [datetime.fromtimestamp(at, UTC) for at, _ in series["values"]],
                [float(value) for _, value in series["values"]],
            )
            for series in result
        ]
    return found


def _legend(pattern: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda name: labels.get(name[1], ""), pattern)


def _draw_lines(axes: Axes, panel: dict[str, Any], found: list[Series], span: range) -> None:
    axes.set_title(panel["title"], loc="left")
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_xlim(datetime.fromtimestamp(span[0], UTC), datetime.fromtimestamp(span[-1], UTC))
    if defaults["custom"]["stacking"]["mode"] == "normal" and found:
        # A missing value counts as 0.
        moments = [datetime.fromtimestamp(at, UTC) for at in span]
        heights = [[dict(zip(times, values, strict=True)).get(at, 0.0) for at in moments] for _, times, values in found]
        axes.stackplot(moments, heights, labels=[name for name, _, _ in found], alpha=0.8)
    else:
        for name, times, values in found:
            axes.plot(times, values, label=name, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(AutoDateLocator(minticks=3, maxticks=6, interval_multiples=False))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M", tz=UTC))
    axes.yaxis.set_major_formatter(lambda value, _: _formatted(value, defaults["unit"]))
    if found:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=6)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")


def _draw_number(axes: Axes, panel: dict[str, Any], found: list[Series]) -> None:
    axes.set_title(panel["title"], loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    if not found:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")
        return
    value = found[0][2][-1]
    defaults = panel["fieldConfig"]["defaults"]
    reached = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or value >= step["value"]]
    axes.set_facecolor(_COLOURS[reached[-1]["color"]])
    text = _formatted(round(value, defaults.get("decimals", 2)), defaults["unit"])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=16, color="white")


def _formatted(value: float, unit: str) -> str:
    if math.isnan(value):
        return "-"
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "s":
        return f"{1000 * value:g} ms" if value < 1 else f"{value:g} s"
    return f"{value:.3g}{'/s' if unit == 'reqps' else ''}"


if __name__ == "__main__":
    main()
