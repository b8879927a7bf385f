#!/usr/bin/env python3
"""Asks whether a locked package has a known vulnerability, and never takes silence for "no".

Exit code 0: every package was looked up and none has one. 1: one has. 3: some could not be looked up, and none of the
others has one.
"""
# ruff: noqa: S603
# It runs the tool that it was made for and reports to a terminal.

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_LOCK = "requirements/run.txt"
_PIP_AUDIT = "pip-audit==2.10.1"
_VULNERABLE, _NOT_AUDITED = 1, 3


def main() -> int:
    """Audit the lock in an environment made for it, and return the exit code."""
    print(f"Asking for known vulnerabilities of what {_LOCK} installs…", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        tools = Path(folder) / "bin"
        install: list[str | Path] = [tools / "pip", "install", "--quiet", "--disable-pip-version-check", _PIP_AUDIT]
        subprocess.run(install, check=True)
        ask: list[str | Path] = [
            tools / "pip-audit",
            "--disable-pip",
            "--require-hashes",
            "--requirement",
            _LOCK,
            "--format",
            "json",
        ]
        asked = subprocess.run(
            [*ask, "--progress-spinner", "off"], cwd=_ROOT, capture_output=True, text=True, check=False
        )
    code, sentences = verdict(asked.stdout, asked.stderr)
    print(*sentences, sep="\n")
    return code


def verdict(report: str, complaint: str) -> tuple[int, list[str]]:
    """Return the exit code, and what to say, for a report of pip-audit and what it complained of."""
    try:
        packages: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = complaint.strip().splitlines()[-1:] or ["it said nothing"]
        return _NOT_AUDITED, [f"NOT AUDITED: pip-audit could not ask ({last[0]})"]
    found = [
        f"{package['name']} {package['version']}: {known['id']}, mended in {', '.join(known['fix_versions']) or 'none'}"
        for package in packages
        for known in package.get("vulns", ())
    ]
    # A registry that answers "not found" for a package that was installed from it knows nothing of vulnerabilities.
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    sentences = []
    if skipped or not packages:
        sentences = [f"NOT AUDITED: {len(skipped)} of {len(packages)} packages could not be looked up from here"]
    if found:
        remedy = 'To mend it: make lock ARGS="--upgrade-package NAME"'
        return _VULNERABLE, [*sentences, *found, remedy]
    if sentences:
        return _NOT_AUDITED, sentences
    return 0, [f"No known vulnerability in {len(packages)} packages."]


if __name__ == "__main__":
    sys.exit(main())
