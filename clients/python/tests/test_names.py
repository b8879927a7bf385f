"""The public names of the package."""

import subprocess
import sys

import pytest

import dedup


def test_every_public_name_can_be_imported_alone() -> None:
    """Each name of `__all__` is importable in a new process. Other names raise AttributeError."""
    for name in dedup.__all__:
        subprocess.run([sys.executable, "-c", f"import dedup\nassert callable(dedup.{name})"], check=True)
    with pytest.raises(AttributeError, match="module 'dedup' has no attribute 'clam'"):
        getattr(dedup, "clam")  # noqa: B009 - mypy sees the plain access
