"""What replies of Redis mean: the value that was asked for, or the error that an error reply stands for."""

from typing import Any

import hiredis

from dedup_service.claims import Applied, Reason, StoreUnavailable, UnreadableValue
from dedup_service.stores import stored_value
from dedup_service.stores.redis.channel import RedisChannel

# What an error reply that begins with this word means; in each case Redis did not carry the command out.
_REFUSALS = {
    "OOM": (Reason.STORE_OUT_OF_MEMORY, "Redis is out of memory: raise maxmemory or free some"),
    "READONLY": (
        Reason.STORE_READ_ONLY,
        "Redis is a read-only replica: name the primary, or wait for the failover to end",
    ),
    "LOADING": (Reason.STORE_LOADING, "Redis is loading its data: wait"),
    "MASTERDOWN": (Reason.STORE_MASTER_DOWN, "Redis is a replica that lost its primary"),
    "CLUSTERDOWN": (Reason.STORE_CLUSTER_DOWN, "the Redis cluster does not serve this key now"),
    "NOAUTH": (Reason.STORE_NOT_AUTHENTICATED, "Redis wants a password: put it into the store URL"),
    "NOPERM": (Reason.STORE_NOT_PERMITTED, "the Redis user of the store URL lacks the right to this command or key"),
    "BUSY": (Reason.STORE_BUSY, "Redis is busy with a script"),
    "MISCONF": (Reason.STORE_MISCONFIGURED, "Redis refuses writes because it cannot save its data: see its log"),
    "NOREPLICAS": (
        Reason.STORE_TOO_FEW_REPLICAS,
        "Redis has fewer replicas in order than min-replicas-to-write asks for",
    ),
    "MOVED": (Reason.STORE_MOVED, "Redis is a cluster, and this server does not hold the key: write redis+cluster://"),
    "ASK": (Reason.STORE_MOVED, "Redis is a cluster, and this server is handing the key over: write redis+cluster://"),
    "TRYAGAIN": (Reason.STORE_TRY_AGAIN, "Redis is a cluster, and the key is between two servers"),
}

# After these a connection can stay wrong while a new one is right: the server behind the address has changed.
_STALE_AFTER = ("READONLY", "NOAUTH", "MASTERDOWN")


class ScriptForgotten(Exception):
    """Redis does not know the script by its name: it restarted, or its scripts were flushed."""


def checked(reply: Any, channel: RedisChannel) -> Any:  # noqa: ANN401 - what Redis may answer
    """Return the reply unless it is an error, which is raised as what it means here."""
    if type(reply) is not hiredis.ReplyError:
        return reply
    if str(reply).startswith("NOSCRIPT"):
        raise ScriptForgotten
    failure = error_of_reply(str(reply))
    if str(reply).startswith(_STALE_AFTER) and isinstance(failure, StoreUnavailable):
        channel.retire(failure)
    raise failure


def value_of(reply: object) -> bytes:
    """Return a reply that is a value; raise StoreUnavailable for any other."""
    if isinstance(reply, bytes):
        return reply
    raise StoreUnavailable(
        Reason.STORE_PROTOCOL_ERROR,
        "Redis answered with something else than a value: is a proxy between?",
        Applied.UNKNOWN,
    )


def error_of_reply(text: str) -> StoreUnavailable | UnreadableValue:
    """Return what an error reply of this text means."""
    word = text.partition(" ")[0]
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
        return StoreUnavailable(reason, f"{sentence} ({word})", Applied.NO)
    # Not a word of Redis itself that we know, so a proxy may have said it after passing the command on. The rest of the
    # text may quote the command, and with it the token.
    return StoreUnavailable(Reason.STORE_ERROR, f"Redis answered with the error {word}", Applied.UNKNOWN)
