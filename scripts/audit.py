#!/usr/bin/env python3
"""Check the locked packages for known vulnerabilities.

Exit codes: 0: none found, all packages looked up. 1: a package has one. 3: none found, but some packages could not be
looked up.
"""
# ruff: noqa: S603
# Runs pip-audit and prints to a terminal.

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
    """Audit the lock from a temporary environment; return the exit code."""
    print(f"Checking the packages of {_LOCK} for known vulnerabilities…", flush=True)
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
    """Return exit code and output lines for pip-audit's report and standard error."""
    try:
        packages: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = complaint.strip().splitlines()[-1:] or ["no output"]
        return _NOT_AUDITED, [f"NOT AUDITED: pip-audit failed ({last[0]})"]
    found = [
        f"{package['name']} {package['version']}: {known['id']}, fixed in {', '.join(known['fix_versions']) or 'none'}"
        for package in packages
        for known in package.get("vulns", ())
    ]
    # Some registries answer "not found" for vulnerabilities of packages they serve.
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    sentences = []
    if skipped or not packages:
        sentences = [f"NOT AUDITED: {len(skipped)} of {len(packages)} packages could not be looked up"]
    if found:
        remedy = 'To upgrade: make lock ARGS="--upgrade-package NAME"'
        return _VULNERABLE, [*sentences, *found, remedy]
    if sentences:
        return _NOT_AUDITED, sentences
    return 0, [f"No known vulnerability in {len(packages)} packages."]


if __name__ == "__main__":
    sys.exit(main())
