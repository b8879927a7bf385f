"""Metadata that travels with the calls of a block, such as the correlation id under which the service logs them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Entry = tuple[str, str | bytes]

_entries: ContextVar[tuple[Entry, ...]] = ContextVar("dedup_metadata", default=())


@contextmanager
def call_metadata(*entries: Entry) -> Iterator[None]:
    """Send these entries with every call that is made inside the block, by this thread or task and what it starts.

    Blocks add up. Claims that travel together in a batch, which is made of several callers, go without.
    """
    token = _entries.set((*_entries.get(), *entries))
    try:
        yield
    finally:
        _entries.reset(token)


def current_metadata() -> tuple[Entry, ...]:
    """Return the entries of all blocks around this call."""
    return _entries.get()
