"""Tokens for callers that send none: 128 bits of the system's randomness each, asked for many at a time."""

import os
from base64 import urlsafe_b64encode
from collections.abc import Iterator

_BYTES = 16
# One question to the kernel for many tokens: asked one by one it costs more than all else that a token takes.
_AT_A_TIME = 256


def claim_tokens() -> Iterator[str]:
    """Yield tokens without end, each of 22 characters of the URL-safe base64 alphabet, for one process alone."""
    while True:
        block = os.urandom(_BYTES * _AT_A_TIME)
        for start in range(0, len(block), _BYTES):
            yield urlsafe_b64encode(block[start : start + _BYTES])[:22].decode()
