"""Runs the commands of a documentation page, and compares their output with the page."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_HEADING = re.compile(r"^#+ (.+)$")
_FENCE = re.compile(r"^(```+)(\w*)$")
# Parts of the output that vary between runs: times, tokens, and numbers with a point, such as versions and durations.
_VARIABLE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\.\d+(?:Z|\+00:00))|(?P<token>(?<![\w-])[\w-]{22}(?![\w-]))|"
    r"(?P<number>\d+(?:\.\d+)+)"
)
_PATTERNS = {
    "time": r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)",
    "token": r"[\w-]{22}",
    "number": r"\d+(\.\d+)+",
}
_ANYTHING = "…"
_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and its output according to the page."""

    command: str
    printed: str


def sections(page: Path) -> dict[str, list[list[Step]]]:
    """Return the ```console blocks of a page by the anchor of their heading."""
    found: dict[str, list[list[Step]]] = {}
    anchor, fence, language = "", "", ""
    block: list[str] = []
    for line in page.read_text().splitlines():
        edge = _FENCE.match(line)
        if fence:
            if edge is not None and edge[1] == fence and not edge[2]:
                if language == "console":
                    found.setdefault(anchor, []).append(list(_steps(block)))
                fence = ""
            else:
                block.append(line)
        elif edge is not None:
            fence, language, block = edge[1], edge[2], []
        elif heading := _HEADING.match(line):
            anchor = re.sub(r"[^\w -]", "", heading[1].lower()).replace(" ", "-")
    return found


def _steps(lines: list[str]) -> Iterator[Step]:
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        printed = "".join(f"{line}\n" for line in lines[start + 1 : end])
        yield Step(lines[start].removeprefix("$ "), printed)


class Reader:
    """Runs the steps of pages in a folder, with the `dedup-service` under test on PATH."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        programs = folder / "bin"
        programs.mkdir()
        program = programs / "dedup-service"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dedup_service "$@"\n')
        program.chmod(0o755)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DEDUP_")}
        self._environment = clean | {"PATH": f"{programs}:{os.environ['PATH']}"}

    def follow(self, step: Step, names: Mapping[str, str], environment: Mapping[str, str]) -> None:
        """Run a step; fail if its output differs from the page.

        `names` maps words of the page, such as an address, to their values in this test.
        """
        command = _replaced(step.command, {".venv/bin/dedup-service": "dedup-service", **names})
        if command.startswith("redis-cli ") and "|" not in command:
            # redis-cli formats replies only for a terminal, as the reader has.
            command = command.replace("redis-cli ", "redis-cli --no-raw ", 1)
        ended = subprocess.run(
            ["bash", "-c", f"{{ {command}\n}} 2>&1"],
            cwd=self._folder,
            env=self._environment | dict(environment),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        expected = _replaced(step.printed, names)
        assert re.fullmatch(_pattern(expected), ended.stdout), (
            f"`{command}` printed\n{ended.stdout}\nbut the page says\n{expected}"
        )


def _replaced(text: str, names: Mapping[str, str]) -> str:
    for written, here in names.items():
        text = text.replace(written, here)
    return text


def runs_here(step: Step) -> bool:
    """Return whether the step can run here. CI runs make targets separately, and grpcurl may be missing."""
    program = step.command.split()[0]
    if program == "grpcurl":
        return shutil.which(program) is not None or "REQUIRE_GRPCURL" in os.environ
    return program != "make"


def _pattern(expected: str) -> str:
    return "".join(
        r"(.*\n)*" if line.strip() == _ANYTHING else _line_pattern(line) + r"\n" for line in expected.splitlines()
    )


def _line_pattern(line: str) -> str:
    pattern, end = "", 0
    for found in _VARIABLE.finditer(line):
        pattern += re.escape(line[end : found.start()]) + _PATTERNS[str(found.lastgroup)]
        end = found.end()
    return (pattern + re.escape(line[end:])).replace(_ANYTHING, ".*")
