"""Build the documentation into build/site. Fails on broken links and on pages that load from other sites.

Pages are Markdown files under their repository paths, so that links between them work on a code host and on the site.
Links to other sites are not checked.
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

# In reading order. A folder stands for its pages; missing pages are skipped, the others are under "More".
SECTIONS: dict[str, Sequence[str]] = {
    "Start": ("README.md", "docs/index.md", "docs/concepts.md", "docs/faq.md", "docs/comparison.md"),
    "Clients": (
        *("clients/python/README.md", "clients/go/README.md", "clients/node/README.md"),
        *("docs/client-contract.md", "docs/other-languages.md", "examples"),
    ),
    "Operate": (
        *("docs/stores.md", "deploy", "docs/observability.md"),
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
    "Project": ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"),
}

# Elements that load nothing until followed.
_FOLLOWED = {"a"}


class _Page(HTMLParser):
    """The links and anchors of a built page."""

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
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607 - found on PATH
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [Path(name) for name in sorted(filter(None, listing.split("\0"))) if (ROOT / name).is_file()]


def stage() -> list[str]:
    """Copy the site's files under their repository paths; return its pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    # Possible targets of links: the contract, golden vectors, examples and configurations.
    wanted = [path for path in _tracked() if path.parts[0] not in ("tests", "dedup_service", ".ci", "requirements")]
    for path in wanted:
        (PAGES / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, PAGES / path)
    return [path.as_posix() for path in wanted if path.suffix == ".md"]


def navigation(pages: Sequence[str]) -> list[dict[str, list[str]]]:
    """Return the sections with the existing pages."""
    left = list(pages)
    shown = []
    for section, names in SECTIONS.items():
        found = [page for name in names for page in pages if page == name or page.startswith(f"{name}/")]
        left = [page for page in left if page not in found]
        shown.append({section: found})
    return [section for section in [*shown, {"More": left}] if any(section.values())]


def faults(page: Path, pages: dict[Path, _Page]) -> Iterator[str]:
    """Yield a page's broken links and resources from other sites."""
    for tag, link in pages[page].links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            if tag not in _FOLLOWED and parts.scheme != "data":
                yield f"<{tag}> loads {link} from another site"
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file():
            yield f"{link} does not exist"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
            yield f"{link}: the page has no such anchor"


def main() -> None:
    """Build and check the site."""
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
        sys.exit("the build failed: see above")
    built = {path: _Page(path.read_text()) for path in SITE.rglob("*.html") if path.name != "404.html"}
    found = [f"{path.relative_to(SITE)}: {fault}" for path in sorted(built) for fault in faults(path, built)]
    if found:
        sys.exit("\n".join(found))
    print(f"Built {len(built)} pages in {SITE.relative_to(ROOT)}. Links to other sites were not checked.")


if __name__ == "__main__":
    main()
