"""Parses `sqlite:` URLs."""

from pathlib import Path


def parse_sqlite_url(url: str) -> Path:
    """Return the path of `sqlite:///absolute/path` or `sqlite:relative/path`; raise ValueError for other URLs."""
    rest = url.removeprefix("sqlite:")
    if rest.startswith("//"):
        if not rest.startswith("///"):
            raise ValueError("a sqlite: store URL names no host: write sqlite:///var/lib/dedup/claims.db")
        rest = rest[2:]
    if not rest.strip("/") or rest.endswith("/") or any(mark in rest for mark in "?#"):
        raise ValueError("a sqlite: store URL names a file and nothing else: write sqlite:///var/lib/dedup/claims.db")
    return Path(rest).expanduser()
