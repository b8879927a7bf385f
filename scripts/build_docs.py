"""Build the documentation into build/site, and fail on a link that leads nowhere or a page that fetches from elsewhere.

The pages are the Markdown files of the repository under their own paths, so that the links between them work on a code
host and on the site alike. Links to other sites are not followed.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
PAGES = BUILD / "docs"
SITE = BUILD / "site"

# What newcomers read first comes first; a folder stands for the pages in it. A page that is not there is left out, and
# one that no section names is shown under "More".
SECTIONS: dict[str, Sequence[str]] = {
    "Start": ("README.md", "docs/index.md", "docs/concepts.md", "docs/faq.md", "docs/comparison.md"),
    "Clients": (
        *("clients/python/README.md", "clients/go/README.md", "clients/node/README.md"),
        *("docs/other-languages.md", "examples"),
    ),
    "Operate": (
        *("docs/running.md", "docs/stores.md", "deploy", "docs/observability.md"),
        *(
            "docs/runbook.md",
            "docs/performance.md",
            "benchmarks",
            "docs/engines.md",
            "docs/security.md",
            "docs/threat-model.md",
        ),
    ),
    "Reference": ("docs/configuration.md", "docs/errors.md", "docs/command-line.md"),
    "Guarantees": ("docs/guarantees.md", "docs/decisions"),
    "Project": ("CONTRIBUTING.md", "CHANGELOG.md"),
}

# What only fetches when somebody follows it, or stays on the page.
_FOLLOWED = {"a"}


class _Page(HTMLParser):
    """Collects what a built page links to and fetches, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append((tag, value))
            elif name == "id" and value:
                self.anchors.add(value)


def _tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607 - by its name on PATH
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [Path(name) for name in sorted(filter(None, listing.split("\0"))) if (ROOT / name).is_file()]


def stage() -> list[str]:
    """Copy what the site is made of under the paths of the repository, and return its pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    # Tests are no documentation, and pages link to the contract, the vectors, examples and configurations beside them.
    wanted = [path for path in _tracked() if path.parts[0] not in ("tests", "dedup_service", ".ci", "requirements")]
    for path in wanted:
        (PAGES / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, PAGES / path)
    return [path.as_posix() for path in wanted if path.suffix == ".md"]


def navigation(pages: Sequence[str]) -> list[dict[str, list[str]]]:
    """Return the sections with the pages that there are."""
    left = list(pages)
    shown = []
    for section, names in SECTIONS.items():
        found = [page for name in names for page in pages if page == name or page.startswith(f"{name}/")]
        left = [page for page in left if page not in found]
        shown.append({section: found})
    return [section for section in [*shown, {"More": left}] if any(section.values())]


def faults(page: Path, pages: dict[Path, _Page]) -> Iterator[str]:
    """Say which links of a built page lead nowhere, and what it would fetch from elsewhere."""
    for tag, link in pages[page].links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            if tag not in _FOLLOWED and parts.scheme != "data":
                yield f"<{tag}> fetches {link}"
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file():
            yield f"{link} is not there"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
            yield f"{link} has no such anchor"


def main() -> None:
    """Build, check, and say where the site is."""
    configuration = (ROOT / "zensical.toml").read_text()
    nav = ", ".join(
        f"{{ {json.dumps(title)} = {json.dumps(found)} }}"
        for section in navigation(stage())
        for title, found in section.items()
    )
    file = BUILD / "zensical.toml"
    file.write_text(configuration.replace("[project]\n", f"[project]\nnav = [{nav}]\n", 1))
    command = [str(Path(sys.executable).parent / "zensical"), "build", "--strict", "--clean", "-f", str(file)]
    if subprocess.run(command, cwd=BUILD, check=False).returncode:  # noqa: S603 - a command without input
        sys.exit("the site was not built: see above")
    built = {path: _Page(path.read_text()) for path in SITE.rglob("*.html") if path.name != "404.html"}
    found = [f"{path.relative_to(SITE)}: {fault}" for path in sorted(built) for fault in faults(path, built)]
    if found:
        sys.exit("\n".join(found))
    print(f"{len(built)} pages are in {SITE.relative_to(ROOT)}. Links to other sites were not checked.")


if __name__ == "__main__":
    main()
