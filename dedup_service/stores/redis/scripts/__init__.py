"""The Lua scripts, and the order of their arguments. Each compares a token and changes its transaction atomically."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

import msgpack

from dedup_service.claims import Completion, Extension, Release, TransactionState

# PX or PXAT, and its argument.
ExpiryArguments = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Script:
    """The text for EVAL and its digest for EVALSHA."""

    text: bytes
    sha: str


# A script and its ARGV.
ScriptCall = tuple[Script, tuple[bytes | str | int, ...]]


def _load(name: str) -> Script:
    folder = files(__package__)
    text = folder.joinpath("held.lua").read_bytes() + folder.joinpath(f"{name}.lua").read_bytes()
    return Script(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


COMPLETE = _load("complete")
RELEASE = _load("release")
EXTEND = _load("extend")
CONFIRM = _load("confirm")


def complete_call(completion: Completion, expiry: ExpiryArguments) -> ScriptCall:
    """Return the call of complete.lua. It replies with the value now stored, or nil if the token does not hold it."""
    return COMPLETE, (
        completion.claim_token,
        completion.result,
        _packed(completion.expiry.time_ms),
        _packed(TransactionState.COMPLETED.value),
        _packed(completion.completion_time_ms),
        _packed(completion.result),
        *expiry,
    )


def extend_call(extension: Extension, expiry: ExpiryArguments) -> ScriptCall:
    """Return the call of extend.lua. It replies with the value now stored, or nil if the token does not hold it."""
    return EXTEND, (
        extension.claim_token,
        _packed(extension.expiry.time_ms),
        *expiry,
        int(extension.allow_shortening),
    )


def release_call(release: Release) -> ScriptCall:
    """Return the call of release.lua. It replies 1 if it deleted the claim, or 0."""
    return RELEASE, (release.claim_token,)


def confirm_call(claim_token: str) -> ScriptCall:
    """Return the call of confirm.lua. It replies 1 after a write that changes nothing, or 0 if not held."""
    return CONFIRM, (claim_token,)


def _packed(value: int | bytes) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed
