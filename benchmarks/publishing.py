"""Publishes figures: Markdown tables, their place in a page, and the scripts' options.

Tables stand between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; the text between the marks is rewritten.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Spread

ROOT = Path(__file__).resolve().parents[1]
# The page with the studies' tables.
STUDIES = ROOT / "benchmarks" / "results" / "studies.md"


def options(doc: str | None) -> argparse.Namespace:
    """Return the command line's options; the help starts with the script's docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="short run of a few seconds, whose figures are meaningless"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write JSON to this file; '-' prints JSON instead of the table"
    )
    parser.add_argument("--from-json", type=Path, metavar="PATH", help="report these results instead of measuring")
    parser.add_argument(
        "--update-docs", action="store_true", help="also write the table to benchmarks/results/studies.md"
    )
    return parser.parse_args()


def publish(name: str, results: dict[str, Any], tables: str, chosen: argparse.Namespace) -> None:
    """Print the tables or the JSON, and write the options' files. `name` is the mark in the page."""
    text = json.dumps(results, indent=1) + "\n"
    if chosen.json and chosen.json != Path("-"):
        chosen.json.write_text(text)
    sys.stdout.write(text if chosen.json == Path("-") else tables)
    if chosen.update_docs:
        update_docs(STUDIES, {name: tables})


def earlier(chosen: argparse.Namespace) -> dict[str, Any] | None:
    """Return the results of --from-json, if given."""
    return json.loads(chosen.from_json.read_text()) if chosen.from_json else None


def say(line: str) -> None:
    """Write a line of progress to standard error."""
    sys.stderr.write(f"{line}\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, left-aligned in the first column only."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(value: float) -> str:
    """Return a figure with three significant digits, whole from 100 on."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def with_range(found: Spread | None) -> str:
    """Return the median with minimum and maximum; empty without a figure."""
    return "" if found is None else f"{number(found.median)} [{number(found.low)}…{number(found.high)}]"


def update_docs(page: Path, tables: Mapping[str, str]) -> None:
    """Write each table between its marks in the page. Raises ValueError for missing marks."""
    text = page.read_text()
    for name, content in tables.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{page} has no marks for the table {name!r}: add {begin} and {end}")
        text = f"{before}{begin}\n{content}{end}{after}"
    page.write_text(text)
