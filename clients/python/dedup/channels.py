"""Channels to the service: their options, and their calls' metadata."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

ChannelOption = tuple[str, str | int]

_OPTIONS: tuple[ChannelOption, ...] = (
    # gRPC's own retries ignore the token and budget of the logical call.
    ("grpc.enable_retries", 0),
    # A sidecar restarts within moments; gRPC's default backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Spreads calls over all addresses of a target, and moves on when one stops.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    # 1,000 duplicates with results of 4,096 bytes exceed gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
)

MetadataEntry = tuple[str, str | bytes]

_entries: ContextVar[tuple[MetadataEntry, ...]] = ContextVar("dedup_metadata", default=())


def channel_options(more: Sequence[ChannelOption]) -> list[ChannelOption]:
    """Return the options of a channel. `more` overrides the defaults; gRPC's own retries stay off."""
    chosen = dict(_OPTIONS) | dict(more) | {"grpc.enable_retries": 0}
    return list(chosen.items())


@contextmanager
def call_metadata(*entries: MetadataEntry) -> Iterator[None]:
    """Send these metadata entries with every call made inside the block by this thread or task.

    Nested blocks add up. A claim made inside is not coalesced, because a batch serves several callers.

    The service logs a call under its `x-correlation-id`: failed calls, slow calls (over 250 ms by default) and a sample
    of the others. A quick success is normally not logged.
    """
    token = _entries.set((*_entries.get(), *entries))
    try:
        yield
    finally:
        _entries.reset(token)


def current_metadata() -> tuple[MetadataEntry, ...]:
    """Return the entries of all enclosing `call_metadata` blocks."""
    return _entries.get()
