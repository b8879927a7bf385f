"""Write the generated parts of the documentation: the settings, the errors and the list of decisions.

Exits with an error unless docs/errors.toml describes every `Reason` except INTERNAL, and nothing else. `--check` writes
nothing, and exits with 1 if a part is stale.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from dedup_service.api.errors import TABLE
from dedup_service.claims import Reason
from dedup_service.config.fields import Kind, Setting
from dedup_service.config.settings import SETTINGS, flag_of, variable_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REMARKS = DOCS / "errors.toml"

_WRITTEN_DEFAULT = re.compile(r"\s*\[default: (.+)\]$")
_METAVARS = {
    "DURATION": "a duration",
    "FILE": "a path",
    "INTEGER": "a number",
    "NUMBER": "a number",
    "TEXT": "",
    "": "",
}

# Exceptions outside the table.
_INTERNAL = (
    f"| `{Reason.INTERNAL}` | `INTERNAL` | unknown | no | A bug. The message has an incident id; the log has the cause "
    "under this id. Operators: [internal errors](runbook.md#errors-internal). |"
)


def settings() -> Iterator[str]:
    """Yield the table of settings, in the order of `serve --help`."""
    yield "| variable | flag | default | meaning |"
    yield "|---|---|---|---|"
    for name, setting in SETTINGS.items():
        meaning, default = _meaning(setting)
        yield f"| `{variable_of(name)}` | `{flag_of(name)}` | {default} | {meaning} |"


def _meaning(setting: Setting) -> tuple[str, str]:
    written = _WRITTEN_DEFAULT.search(setting.description)
    text = _WRITTEN_DEFAULT.sub("", setting.description)
    shown = setting.shown_default
    default = written[1] if written else f"`{shown}`" if shown else "none"
    return _cell(" ".join(filter(None, [text, _limits(setting.kind)]))), _cell(default)


def _limits(kind: Kind) -> str:
    if "|" in kind.metavar:
        return f"One of {', '.join(f'`{word}`' for word in kind.metavar.split('|'))}."
    words = ", ".join(filter(None, (_METAVARS[kind.metavar], *kind.limits)))
    return f"{words[0].upper()}{words[1:]}." if words else ""


def errors() -> Iterator[str]:
    """Yield the table of errors."""
    return error_rows(tomllib.loads(REMARKS.read_text()))


def error_rows(remarks: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Iterator[str]:
    """Yield the table of errors in the order of `remarks`: exception, then reason. Exits if Reason differs."""
    name = REMARKS.relative_to(ROOT)
    described = {reason for reasons in remarks.values() for reason in reasons}
    sent = {reason.value for reason in Reason if reason is not Reason.INTERNAL}
    if missing := sent - described:
        sys.exit(f"{name} does not describe {', '.join(sorted(missing))}: add an entry for each")
    if unused := described - sent:
        sys.exit(f"{name} describes {', '.join(sorted(unused))}, which is not a Reason: remove it")
    errors_by_name = {error.__name__: error for error in TABLE}
    if unknown := remarks.keys() - errors_by_name.keys():
        sys.exit(f"{name} has {', '.join(sorted(unknown))}, which is not in the error table: correct the name")
    for kind, error in errors_by_name.items():
        fixed = getattr(error, "reason", None)
        if fixed is not None and set(remarks.get(kind, ())) != {fixed.value}:
            sys.exit(f"{name} must describe {fixed.value}, and nothing else, under {kind}")
    yield "| reason | gRPC code | applied | `RetryInfo` | meaning and remedy |"
    yield "|---|---|---|---|---|"
    for kind, reasons in remarks.items():
        row = TABLE[errors_by_name[kind]]
        retry = "no" if row.retry_after_ms is None else f"{row.retry_after_ms} ms"
        for reason, remark in reasons.items():
            text = _cell(f"{remark['means']} {remark['remedy']}")
            yield f"| `{reason}` | `{row.code.name}` | {remark['applied']} | {retry} | {text} |"
    yield _INTERNAL


def decisions() -> Iterator[str]:
    """Yield a line for each decision."""
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
    """Return the page with a part's text replaced. Exits without its marks."""
    begin, end = f"<!-- generated: {part}, by make docs-reference -->\n", f"<!-- end: {part} -->"
    if begin not in text or end not in text:
        sys.exit(f"a page lacks the marks {begin.strip()!r} and {end!r}")
    before, _, rest = text.partition(begin)
    return before + begin + "\n" + "\n".join(lines) + "\n\n" + end + rest.partition(end)[2]


def main() -> None:
    """Write the parts, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 if a part is stale.")
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
