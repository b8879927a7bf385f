"""The meaning of Redis replies: a value, number or time, or the error of an error reply."""

from typing import Any

import hiredis

from dedup_service.claims import Applied, InvalidRequest, Reason, StoreUnavailable, UnreadableValue
from dedup_service.claims.limits import expire_time_past, expire_time_too_far
from dedup_service.stores import stored_value
from dedup_service.stores.redis.channel import RedisChannel

# Error replies by their first word. Redis did not carry out the command.
_REFUSALS = {
    "OOM": (Reason.STORE_OUT_OF_MEMORY, "Redis is out of memory: raise maxmemory or free some"),
    "READONLY": (
        Reason.STORE_READ_ONLY,
        "Redis is a read-only replica: name the primary, or wait for the failover to end",
    ),
    "LOADING": (Reason.STORE_LOADING, "Redis is loading its data: wait"),
    "MASTERDOWN": (Reason.STORE_MASTER_DOWN, "Redis is a replica that lost its primary: restore the primary"),
    "CLUSTERDOWN": (
        Reason.STORE_CLUSTER_DOWN,
        "the Redis cluster does not serve this key now: check it with redis-cli --cluster check",
    ),
    "NOAUTH": (Reason.STORE_NOT_AUTHENTICATED, "Redis requires a password: put it into the store URL"),
    "NOPERM": (
        Reason.STORE_NOT_PERMITTED,
        "the Redis user of the store URL lacks the right to this command or key: dedup-service doctor names it",
    ),
    "BUSY": (Reason.STORE_BUSY, "Redis is busy with a script: wait, or end it with SCRIPT KILL"),
    "MISCONF": (Reason.STORE_MISCONFIGURED, "Redis refuses writes because it cannot save its data: see its log"),
    "NOREPLICAS": (
        Reason.STORE_TOO_FEW_REPLICAS,
        "Redis has fewer working replicas than min-replicas-to-write: connect more, or lower it",
    ),
    "MOVED": (Reason.STORE_MOVED, "Redis is a cluster, and this server does not hold the key: write redis+cluster://"),
    "ASK": (Reason.STORE_MOVED, "Redis is a cluster, and this server is handing the key over: write redis+cluster://"),
    "TRYAGAIN": (Reason.STORE_TRY_AGAIN, "the Redis cluster is moving the key between two servers: try again"),
}

# After these a connection can stay wrong: another server is behind the address.
_STALE_AFTER = ("READONLY", "NOAUTH", "MASTERDOWN")


class ScriptForgotten(StoreUnavailable):
    """Redis forgot the script: it restarted, or flushed its scripts."""


class KeyForbidden(Exception):
    """The cause of a failure: the Redis user may run the command, but not with this key."""


def checked(reply: Any, channel: RedisChannel) -> Any:  # noqa: ANN401 - any reply of Redis
    """Return the reply; raise an error reply as a ClaimError."""
    if type(reply) is not hiredis.ReplyError:
        return reply
    if str(reply).startswith("NOSCRIPT"):
        raise ScriptForgotten(Reason.STORE_ERROR, "Redis answered with the error NOSCRIPT", Applied.UNKNOWN)
    failure = error_of_reply(str(reply))
    if str(reply).startswith(_STALE_AFTER) and isinstance(failure, StoreUnavailable):
        channel.retire(failure)
    raise failure


def value_of(reply: object) -> bytes:
    """Return a value; raise StoreUnavailable for any other reply."""
    if isinstance(reply, bytes):
        return reply
    raise _unexpected_reply("a value", Applied.UNKNOWN)


def number_of(reply: object) -> int:
    """Return a number; raise StoreUnavailable for any other reply."""
    if type(reply) is int:
        return reply
    raise _unexpected_reply("a number", Applied.UNKNOWN)


def time_ms_of(reply: object) -> int:
    """Return the Unix milliseconds of a TIME reply; raise StoreUnavailable (never applied) for any other."""
    match reply:
        case [bytes(seconds), bytes(microseconds)] if _is_number(seconds) and _is_number(microseconds):
            return int(seconds) * 1000 + int(microseconds) // 1000
    raise _unexpected_reply("the time", Applied.NO)


def _is_number(text: bytes) -> bool:
    # Python refuses to convert very long digits.
    return text.isdigit() and len(text) < 20


def _unexpected_reply(expected: str, applied: Applied) -> StoreUnavailable:
    return StoreUnavailable(
        Reason.STORE_PROTOCOL_ERROR,
        f"Redis sent a reply that is not {expected}: check for a proxy between this service and Redis",
        applied,
    )


def error_of_reply(text: str) -> StoreUnavailable | UnreadableValue | InvalidRequest:
    """Return the error of an error reply."""
    word, _, rest = text.partition(" ")
    if word == "EXPIRE_TIME_PAST":
        return expire_time_past()
    if word == "EXPIRE_TIME_TOO_FAR" and _is_number(rest.encode()):
        return expire_time_too_far(int(rest))
    if word == "WRONGTYPE":
        return UnreadableValue(
            Reason.KEY_OF_ANOTHER_TYPE,
            "the key of this transaction holds another type of Redis value: choose another key prefix or id",
        )
    if word in stored_value.UNREADABLE:
        reason = Reason(word)
        return UnreadableValue(reason, stored_value.UNREADABLE[reason])
    if word in _REFUSALS:
        reason, sentence = _REFUSALS[word]
        failure = StoreUnavailable(reason, f"{sentence} ({word})", Applied.NO)
        if word == "NOPERM" and " key" in text:
            failure.__cause__ = KeyForbidden()
        return failure
    # UNKNOWN: a proxy may have passed the command on. The rest of the text may quote the token.
    return StoreUnavailable(
        Reason.STORE_ERROR, f"Redis answered with the error {word}: see the log of Redis", Applied.UNKNOWN
    )
