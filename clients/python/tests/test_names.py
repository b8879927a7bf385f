"""The names that the package offers."""

import subprocess
import sys

import pytest

import dedup


def test_every_name_is_there() -> None:
    """Each name of `__all__` is found at its first use, by itself, and another one is an AttributeError."""
    for name in dedup.__all__:
        subprocess.run([sys.executable, "-c", f"import dedup\nassert callable(dedup.{name})"], check=True)
    with pytest.raises(AttributeError, match="module 'dedup' has no attribute 'clam'"):
        getattr(dedup, "clam")  # noqa: B009 - mypy sees the plain access
