"""Transaction ids, claim tokens, and how logs name a transaction."""

import hashlib
import re
import secrets

MAX_TRANSACTION_ID_BYTES = 512

# The separator, the escape itself, and Unicode's category Cc: the C0 controls, delete and the C1 controls.
_ESCAPED = re.compile(r"[%:\x00-\x1f\x7f-\x9f]")


def transaction_id(*parts: str) -> str:
    """Join parts into one transaction id, so that different parts never make the same id.

    Parts are joined with ':'. In a part '%', ':' and control characters become %XX for each byte of their UTF-8, in
    upper-case hexadecimal. Every client in every language makes the same id of the same parts. Nothing is normalised.

    Raises ValueError without a part, for an empty id, and for one of more than 512 bytes; TypeError for a part that is
    no text, since there is no one way to write a number or a date.
    """
    if not parts:
        raise ValueError("a transaction id needs at least one part")
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"a part of a transaction id is text, not {type(part).__name__}: write it as you want it")
    joined = ":".join(_ESCAPED.sub(_percent, part) for part in parts)
    if not joined:
        raise ValueError("a transaction id has at least 1 byte, this one is empty")
    size = len(joined.encode())
    if size > MAX_TRANSACTION_ID_BYTES:
        raise ValueError(
            f"a transaction id has at most {MAX_TRANSACTION_ID_BYTES} bytes, this one has {size} once escaped: "
            "put a digest in place of a long part"
        )
    return joined


def logged_id(transaction_id: str) -> str:
    """Return the name of a transaction in logs: the first 16 hexadecimal digits of the SHA-256 of its id.

    An id may name a person. The service logs the same digits unless it has a key for them.
    """
    return hashlib.sha256(transaction_id.encode(errors="surrogatepass")).hexdigest()[:16]


def new_claim_token() -> str:
    """Return a fresh token for one logical call: 22 characters, 128 bits of chance."""
    return secrets.token_urlsafe(16)


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode())
