"""The commands of a documentation page, run as a reader would, and what they print held against what the page says."""

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
# What differs from run to run: times, tokens, and numbers with a point, such as versions and durations.
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
    """A command, and what the page says that it prints."""

    command: str
    printed: str


def sections(page: Path) -> dict[str, list[list[Step]]]:
    """Return the blocks of commands (```console) of a page, by the anchor of the heading that they are under."""
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
    """Runs the steps of pages in a folder, where `dedup-service` is the one under test."""

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
        """Run a step to its end; raise AssertionError when it prints something else than the page says.

        `names` replaces what pages write, such as an address, by what it is in this test.
        """
        command = _replaced(step.command, {".venv/bin/dedup-service": "dedup-service", **names})
        if command.startswith("redis-cli ") and "|" not in command:
            # It prints for people where it is not piped on, and cannot see that here.
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
            f"`{command}` printed\n{ended.stdout}\nand the page says\n{expected}"
        )


def _replaced(text: str, names: Mapping[str, str]) -> str:
    for written, here in names.items():
        text = text.replace(written, here)
    return text


def runs_here(step: Step) -> bool:
    """Return whether the step can run: make targets have CI steps of their own, and grpcurl is not everywhere."""
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
