"""Write the generated parts of the documentation: the settings, the errors and the list of decisions.

With `--check` nothing is written, and the exit code is 1 when a part is stale. A reason that the sources can send and
docs/errors.toml does not describe ends it with a sentence, and so does one that nothing sends.
"""

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import annotated_types
from pydantic.fields import FieldInfo

from dedup_service.cli.serve import metavar, shown_default
from dedup_service.api.errors import TABLE
from dedup_service.config.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REMARKS = DOCS / "errors.toml"

# Every word of this form in the sources of the stores is a reason.
_REASON = re.compile(r"[A-Z]+(_[A-Z]+)+")
_WRITTEN_DEFAULT = re.compile(r"\s*\[default: (.+)\]$")
_METAVARS = {"DURATION": "a duration", "FILE": "a path", "INTEGER": "a number", "NUMBER": "a number", "TEXT": ""}

# What a bug is told as; it is not in the table, since it stands for everything that is not.
_BUG = (
    "| `INTERNAL` | `INTERNAL` | unknown | no | A bug. The message has an id under which the log has the cause. "
    "Operators: [internal errors](runbook.md#errors-internal). |"
)


def settings() -> Iterator[str]:
    """Return the rows of the settings, in the order of `serve --help`."""
    yield "| variable | flag | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in Settings.model_fields.items():
        meaning, default = _meaning(field)
        yield f"| `{ENV_PREFIX}{name.upper()}` | `--{name.replace('_', '-')}` | {default} | {meaning} |"


def _meaning(field: FieldInfo) -> tuple[str, str]:
    text = field.description or ""
    written = _WRITTEN_DEFAULT.search(text)
    text = _WRITTEN_DEFAULT.sub("", text)
    shown = shown_default(field)
    default = written[1] if written else f"`{shown}`" if shown else "none"
    return _cell(" ".join(filter(None, [text, _limits(field)]))), _cell(default)


def _limits(field: FieldInfo) -> str:
    kind = metavar(field)
    if field.annotation is bool:
        return ""
    if "|" in kind:
        return f"One of {', '.join(f'`{word}`' for word in kind.split('|'))}."
    least = next((f"at least {item.ge}" for item in field.metadata if isinstance(item, annotated_types.Ge)), "")
    above = next((f"more than {item.gt}" for item in field.metadata if isinstance(item, annotated_types.Gt)), "")
    most = next((f"at most {item.le}" for item in field.metadata if isinstance(item, annotated_types.Le)), "")
    words = [word for word in (_METAVARS[kind], least or above, most) if word]
    return f"{words[0].capitalize()}{''.join(f', {word}' for word in words[1:])}." if words else ""


def errors() -> Iterator[str]:
    """Return the rows of the errors."""
    return error_rows(tomllib.loads(REMARKS.read_text()))


def error_rows(remarks: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Iterator[str]:
    """Return the rows of the errors in the order of `remarks`; exit when that and the sources differ."""
    described = {reason for reasons in remarks.values() for reason in reasons}
    sent = store_reasons() | {row.reason for row in TABLE.values() if row.reason}
    name = REMARKS.relative_to(ROOT)
    if missing := sent - described:
        sys.exit(f"{name} does not describe {', '.join(sorted(missing))}: add an entry for each")
    if unused := described - sent:
        sys.exit(f"{name} describes {', '.join(sorted(unused))}, which nothing sends: remove it")
    rows = {error.__name__: row for error, row in TABLE.items()}
    yield "| reason | gRPC code | applied | `RetryInfo` | means, and what to do |"
    yield "|---|---|---|---|---|"
    for kind, reasons in remarks.items():
        row = rows[kind]
        retry = "no" if row.retry_after_ms is None else f"{row.retry_after_ms} ms"
        for reason, remark in reasons.items():
            told = _cell(f"{remark['means']} {remark['remedy']}")
            yield f"| `{reason}` | `{row.code.name}` | {remark['applied']} | {retry} | {told} |"
    yield _BUG


def store_reasons() -> set[str]:
    """Return every reason that a store can give, by the words of that form in its sources."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "dedup_service" / "stores").rglob("*.py"))
    words = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {word for word in words if isinstance(word, str) and _REASON.fullmatch(word)}


def decisions() -> Iterator[str]:
    """Return a line for each decision."""
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        title = path.read_text().partition("\n")[0].removeprefix("# ")
        number, _, name = title.partition(". ")
        yield f"{number}. [{name}]({path.name})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PARTS = {
    ("docs/configuration.md", "settings"): settings,
    ("docs/errors.md", "errors"): errors,
    ("docs/decisions/README.md", "decisions"): decisions,
}


def updated(text: str, part: str, lines: Iterator[str]) -> str:
    """Return the page with what stands between the marks of a part replaced; exit when it has no such marks."""
    begin, end = f"<!-- generated: {part}, by make docs-reference -->\n", f"<!-- end: {part} -->"
    if begin not in text or end not in text:
        sys.exit(f"a page lacks the marks {begin.strip()!r} and {end!r}")
    before, _, rest = text.partition(begin)
    return before + begin + "\n" + "\n".join(lines) + "\n\n" + end + rest.partition(end)[2]


def main() -> None:
    """Write the parts, or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 when a part is stale.")
    check = parser.parse_args().check
    stale = []
    for (page, part), lines in PARTS.items():
        text = (ROOT / page).read_text()
        new = updated(text, part, lines())
        if new != text:
            stale.append(page)
            if not check:
                (ROOT / page).write_text(new)
    if check and stale:
        sys.exit(f"stale: {', '.join(stale)}: run make docs-reference")


if __name__ == "__main__":
    main()
