"""The audit of the locked packages: the verdict on a report, and without one."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Verdict = Callable[[str, str], tuple[int, list[str]]]
VERDICT: Verdict = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "audit.py"))["verdict"]

CLEAN: dict[str, Any] = {"name": "redis", "version": "8.1.0", "vulns": []}
SKIPPED: dict[str, Any] = {"name": "grpcio", "skip_reason": "Dependency not found on PyPI"}
BAD: dict[str, Any] = {"name": "typer", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]}


@pytest.mark.parametrize(
    ("packages", "code", "words"),
    [
        ([CLEAN], 0, "No known vulnerability in 1 packages."),
        ([CLEAN, BAD], 1, "typer 1.0: CVE-1, fixed in 1.1"),
        ([CLEAN, SKIPPED], 3, "NOT AUDITED: 1 of 2 packages"),
        ([SKIPPED, BAD], 1, "typer 1.0: CVE-1"),
        ([], 3, "NOT AUDITED: 0 of 0 packages"),
    ],
)
def test_the_verdict_on_a_report(packages: list[dict[str, Any]], code: int, words: str) -> None:
    """A vulnerability fails the audit, and an unaudited package is not reported as clean."""
    found, sentences = VERDICT(json.dumps({"dependencies": packages}), "")
    assert found == code
    assert words in "\n".join(sentences)


@pytest.mark.parametrize("report", ["", "no JSON", "[]", "{}"])
def test_without_a_report_nothing_is_audited(report: str) -> None:
    """If the vulnerability service is unreachable, the verdict quotes the last line of the error."""
    assert VERDICT(report, "Traceback\nConnectionError: no route\n") == (
        3,
        ["NOT AUDITED: pip-audit failed (ConnectionError: no route)"],
    )
