"""How channels to the service are set up, the same for both clients."""

from collections.abc import Sequence

ChannelOption = tuple[str, str | int]

_OPTIONS: tuple[ChannelOption, ...] = (
    # gRPC's own retries know neither the token nor the budget of the logical call.
    ("grpc.enable_retries", 0),
    # A sidecar that restarts is back within moments: do not stay away for gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A thousand duplicates with a result of 4,096 bytes each are a little more than gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 8 * 1024 * 1024),
)


def channel_options(more: Sequence[ChannelOption]) -> list[ChannelOption]:
    """Return the options of a channel; `more` wins, except that gRPC's own retries stay off."""
    chosen = dict(_OPTIONS) | dict(more) | {"grpc.enable_retries": 0}
    return list(chosen.items())
