"""Decoding of requests without an event loop."""

from dedup_service.api import decoding
from dedup_service.api.decoding import RequestT


def decoded(request_type: type[RequestT], raw: bytes) -> RequestT:
    """Return the decoded message, through every turn of `decode_request`. Raises InvalidRequest."""
    turns = decoding.decode_request(request_type, raw)
    while True:
        try:
            turns.send(None)
        except StopIteration as end:
            message: RequestT = end.value
            return message
