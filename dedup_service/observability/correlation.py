"""The id that ties one call to its caller's own logs."""

import re
import secrets
from collections.abc import Iterable

CORRELATION_HEADER = "x-correlation-id"

# Longer or stranger ids are not worth echoing into every log line.
_USABLE = re.compile(r"[\x21-\x7e]{1,128}")

# https://www.w3.org/TR/trace-context/#traceparent-header-field-values: version, trace id, parent id, flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def correlation_id(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Return the caller's correlation id, or a new one of 32 hexadecimal digits.

    The first usable one of `x-correlation-id`, `x-request-id` and the trace id of `traceparent` is taken; usable are 1
    to 128 visible ASCII characters.
    """
    found: dict[str, str] = {}
    for key, value in metadata:
        if key in (CORRELATION_HEADER, "x-request-id", "traceparent") and isinstance(value, str):
            found.setdefault(key, value)
    if found:
        for key in (CORRELATION_HEADER, "x-request-id"):
            if _USABLE.fullmatch(found.get(key, "")):
                return found[key]
        if match := _TRACEPARENT.fullmatch(found.get("traceparent", "")):
            return match[1]
    return secrets.token_hex(16)
