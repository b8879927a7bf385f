#!/usr/bin/env python3
"""Run h2spec, which checks the conformance to HTTP/2, against each engine.

Exit code 1: a section fails that docs/engines.md does not explain for the engine, or the engine did not survive.
"""
# ruff: noqa: S603
# Runs h2spec and prints to a terminal.

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import get_args

from dedup_service.config.settings import EngineName
from tests.support.processes import ServiceProcess

_ROOT = Path(__file__).parents[1]
_H2SPEC = _ROOT / "build/bin/h2spec"


def main() -> int:
    """Check every engine; return the exit code."""
    unexplained = 0
    for engine in get_args(EngineName):
        failures, total = run(engine)
        print(f"{engine}: {len(failures)} of {total} tests fail")
        for section, test in failures:
            if section not in explained(engine):
                unexplained += 1
                print(f"  not in docs/engines.md: {section}: {test}")
    return 1 if unexplained else 0


def run(engine: EngineName) -> tuple[list[tuple[str, str]], int]:
    """Return the failed tests, with their section, and the number of all."""
    with tempfile.TemporaryDirectory() as folder:
        service = ServiceProcess("--engine", engine, "--store-url", f"sqlite://{folder}/claims.db").start()
        host, _, port = service.target.rpartition(":")
        report = Path(folder) / "report.xml"
        command: list[str | Path] = [_H2SPEC, "--host", host, "--port", port, "--junit-report", report]
        try:
            subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
            if service.stop() != 0:
                sys.exit(f"{engine} did not survive")
        finally:
            service.kill()
        tests = list(ET.parse(report).iter("testcase"))  # noqa: S314 - our own file
    failed = [test for test in tests if test.find("error") is not None or test.find("failure") is not None]
    return [(test.attrib["package"], test.attrib["classname"]) for test in failed], len(tests)


def explained(engine: EngineName) -> set[str]:
    """Return the sections that the table of docs/engines.md explains for an engine."""
    lines = (_ROOT / "docs/engines.md").read_text().partition("## h2spec")[2].splitlines()
    rows = [line for line in lines if line.startswith("|") and (f"`{engine}`" in line or "| both |" in line)]
    return set(re.findall(r"`((?:generic|http2|hpack)/[\d.]+)`", "".join(rows)))


if __name__ == "__main__":
    sys.exit(main())
