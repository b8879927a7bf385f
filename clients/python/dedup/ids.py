"""Transaction ids, claim tokens, and the names of transactions in logs."""

import hashlib
import re
import secrets

MAX_TRANSACTION_ID_BYTES = 512

# The separator, the escape character, and Unicode's Cc: C0, delete and C1.
_ESCAPED = re.compile(r"[%:\x00-\x1f\x7f-\x9f]")


def transaction_id(*parts: str) -> str:
    """Join parts into one transaction id. Different parts never make the same id.

    Parts are joined with ':'. In each, '%', ':' and control characters become %XX for each byte of their UTF-8, in
    upper-case hexadecimal. Text is not normalised. Clients in every language make the same id.

    Raises ValueError without parts, and for an id that is empty or longer than 512 bytes. Raises TypeError for a part
    that is not a string: numbers and dates have several spellings.
    """
    if not parts:
        raise ValueError("a transaction id needs at least one part")
    for part in parts:
        if not isinstance(part, str):
            raise TypeError(f"a part of a transaction id must be a string, not {type(part).__name__}: convert it first")
    joined = ":".join(_ESCAPED.sub(_percent, part) for part in parts)
    if not joined:
        raise ValueError("the transaction id is empty; it must have at least 1 byte")
    size = len(joined.encode())
    if size > MAX_TRANSACTION_ID_BYTES:
        raise ValueError(
            f"the transaction id has {size} bytes after escaping; it must have at most "
            f"{MAX_TRANSACTION_ID_BYTES} bytes: replace a long part by its digest"
        )
    return joined


def new_claim_token() -> str:
    """Return a fresh token for one logical call: 22 characters, 128 random bits."""
    return secrets.token_urlsafe(16)


def logged_id(transaction_id: str) -> str:
    """Return a transaction's name in logs: the first 16 hexadecimal digits of its id's SHA-256.

    Logs never contain an id, which may name a person. The service logs the same digits unless it hashes with a key.
    """
    return hashlib.sha256(transaction_id.encode(errors="surrogatepass")).hexdigest()[:16]


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode())
