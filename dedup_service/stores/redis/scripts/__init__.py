"""The Lua scripts, and the order of their arguments. Each is one atomic step on one key."""

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

import msgpack

from dedup_service.claims import Completion, Expiry, Extension, Release, TransactionState
from dedup_service.stores.stored_value import MAX_VALUE_BYTES


@dataclass(frozen=True, slots=True)
class Script:
    """The text for EVAL and its digest for EVALSHA."""

    text: bytes
    sha: str


# A script and its ARGV.
ScriptCall = tuple[Script, tuple[bytes | str | int, ...]]


_COMMENTS = re.compile(rb"^ *--.*\n|^\n", re.MULTILINE)


def _load(*names: str) -> Script:
    folder = files(__package__)
    parts = (folder.joinpath(f"{name}.lua").read_bytes() for name in ("limits", *names))
    text = _COMMENTS.sub(b"", b"local LONGEST = %d\n" % MAX_VALUE_BYTES + b"".join(parts))
    return Script(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


CLAIM = _load("claim")
GET = _load("get")
COMPLETE = _load("held", "complete")
RELEASE = _load("held", "release")
EXTEND = _load("held", "extend")
CONFIRM = _load("held", "confirm")


def expiry_arguments(expiry: Expiry) -> tuple[str, int]:
    """Return PX or PXAT, and its argument."""
    return ("PXAT", expiry.time_ms) if expiry.ttl_ms is None else ("PX", expiry.ttl_ms)


def claim_call(value: bytes, expiry: Expiry) -> ScriptCall:
    """Return the call of claim.lua. It replies with nil if it stored the value, or with the holder's value."""
    return CLAIM, (value, *_limited(expiry))


def complete_call(completion: Completion) -> ScriptCall:
    """Return the call of complete.lua. It replies with the value now stored, or nil if the token does not hold it."""
    return COMPLETE, (
        completion.claim_token,
        completion.result,
        _packed(completion.expiry.time_ms),
        _packed(TransactionState.COMPLETED.value),
        _packed(completion.completion_time_ms),
        _packed(completion.result),
        *_limited(completion.expiry),
    )


def extend_call(extension: Extension) -> ScriptCall:
    """Return the call of extend.lua. It replies with the value now stored, or nil if the token does not hold it."""
    return EXTEND, (
        extension.claim_token,
        _packed(extension.expiry.time_ms),
        *_limited(extension.expiry),
        int(extension.allow_shortening),
    )


def release_call(release: Release) -> ScriptCall:
    """Return the call of release.lua. It replies 1 if it deleted the claim, or 0."""
    return RELEASE, (release.claim_token,)


def confirm_call(claim_token: str) -> ScriptCall:
    """Return the call of confirm.lua. It replies 1 after a write that changes nothing, or 0 if not held."""
    return CONFIRM, (claim_token,)


def _limited(expiry: Expiry) -> tuple[str | int, ...]:
    return *expiry_arguments(expiry), "" if expiry.max_ttl_ms is None else expiry.max_ttl_ms


def _packed(value: int | bytes) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed
