"""The distributions: one version, one licence, no file shipped by two."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dedup_service import __version__

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "clients"


def project(folder: Path) -> dict[str, Any]:
    """Return the parsed pyproject.toml of a folder."""
    return tomllib.loads((folder / "pyproject.toml").read_text())


def test_all_distributions_have_one_version() -> None:
    """The server requires the client of exactly its own version."""
    server, client = project(ROOT), project(CLIENTS / "python")
    assert server["project"]["dynamic"] == ["version"]
    assert server["tool"]["hatch"]["version"]["path"] == "dedup_service/__init__.py"
    assert client["project"]["version"] == __version__
    assert json.loads((CLIENTS / "node" / "package.json").read_text())["version"] == __version__
    required = [line for line in server["project"]["dependencies"] if line.startswith("dedup-client")]
    assert required == [f"dedup-client=={__version__}"]


def test_no_package_is_shipped_by_two_distributions() -> None:
    """Uninstalling one distribution must not remove files of the other."""
    assert project(ROOT)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["dedup_service"]
    assert project(CLIENTS / "python")["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["dedup"]


@pytest.mark.parametrize("lock", ["run.txt", "dev.txt", "docs.txt"])
def test_the_lock_has_only_packages_of_a_registry(lock: str) -> None:
    """The client is installed from this tree, and names no registry."""
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    assert not [line for line in lines if line.startswith(("dedup-client", "-e ", "./", "file:", "--index", "--find"))]
    assert not [line for line in lines if "://" in line]


@pytest.mark.parametrize("folder", ["python", "node"])
def test_every_package_has_the_licence(folder: str) -> None:
    """Packages contain files of their own folder only, so each has a copy."""
    assert (CLIENTS / folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
