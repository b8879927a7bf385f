"""What the scripts that measure one thing have in common: their options, their progress, and where the figures go."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import update_docs

ROOT = Path(__file__).resolve().parents[1]


def options(doc: str | None) -> argparse.Namespace:
    """Return the options of the command line, described by the first line of a script's docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="see in seconds that it runs: no figures to keep")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the JSON here; '-' prints it, and no table")
    parser.add_argument("--from-json", type=Path, metavar="PATH", help="measure nothing, report these results anew")
    parser.add_argument("--update-docs", action="store_true", help="write the table into docs/performance.md as well")
    return parser.parse_args()


def publish(name: str, results: dict[str, Any], tables: str, chosen: argparse.Namespace) -> None:
    """Print the tables or the JSON, and write what the options ask for; the page has the tables under `name`."""
    text = json.dumps(results, indent=1) + "\n"
    if chosen.json and chosen.json != Path("-"):
        chosen.json.write_text(text)
    sys.stdout.write(text if chosen.json == Path("-") else tables)
    if chosen.update_docs:
        update_docs(ROOT / "docs" / "performance.md", {name: tables})


def earlier(chosen: argparse.Namespace) -> dict[str, Any] | None:
    """Return the results that the options name instead of a measurement, if any."""
    return json.loads(chosen.from_json.read_text()) if chosen.from_json else None


def say(line: str) -> None:
    """Print a line of progress."""
    sys.stderr.write(f"{line}\n")
