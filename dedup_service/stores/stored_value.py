"""The stored record: its key, and a value that is a msgpack array, version first, the same in every store.

`[1, token, claimant, claim_time_ms, expire_time_ms, state, fingerprint, completion_time_ms, result]`. Readers accept a
longer array (a newer writer that only added fields) and refuse another version. Any other value was not written by this
service and is a claim by an unknown holder.
"""

from collections.abc import Callable

import msgpack

from dedup_service.claims import (
    DEFAULT_NAMESPACE,
    FieldViolation,
    InvalidRequest,
    Reason,
    Transaction,
    TransactionState,
    UnreadableValue,
)

KeyLayout = Callable[[str, str], bytes]


def prefixed_layout(prefix: str) -> KeyLayout:
    """Return the layout `{prefix}{namespace}:{transaction_id}`. It is injective: a namespace contains no colon."""
    prefix_bytes = prefix.encode()

    def key(namespace: str, transaction_id: str) -> bytes:
        return b"%b%b:%b" % (prefix_bytes, namespace.encode(), transaction_id.encode())

    return key


def raw_layout(namespace: str, transaction_id: str) -> bytes:
    """Return the transaction id itself, the key that services with an in-process SETNX write.

    Raises InvalidRequest unless the namespace is the default one: the key cannot keep namespaces apart.
    """
    if namespace != DEFAULT_NAMESPACE:
        raise InvalidRequest(
            FieldViolation(
                "namespace",
                f"must be {DEFAULT_NAMESPACE!r} or absent: the raw key layout of this server has no namespaces",
            )
        )
    return transaction_id.encode()


def canary_prefix(layout: KeyLayout, prefix: str) -> bytes:
    """Return a prefix of keys that no transaction has: a namespace has no '~', and an id no control character."""
    return b"dedup-canary\x1f" if layout is raw_layout else b"%b~canary:" % prefix.encode()


def probe_key(layout: KeyLayout, hash_tag: bytes) -> bytes | None:
    """Return a key with this hash tag beside those of the default namespace; no id has its control character.

    None in the raw layout, where the rights of a user follow the ids.
    """
    return None if layout is raw_layout else layout(DEFAULT_NAMESPACE, f"\x1fprobe{hash_tag.decode()}")


VERSION = 1

MAX_VALUE_BYTES = 1_048_576 + 65_536
"""No version of this service writes a longer value: the largest allowed result, and room for every other field."""

UNREADABLE = {
    Reason.VALUE_VERSION_UNKNOWN: f"the stored value has another version than {VERSION}, which this service reads: "
    "upgrade this service, or wait until the transaction expires",
    Reason.VALUE_DAMAGED: "the stored value is damaged: find the other writer of this key, then delete the key or "
    "let it expire",
}
"""The reasons why a value is unreadable, with remedies."""

_FIELDS = 9
_FIELD_TYPES = [int, str, str, int, int, int, bytes, int, bytes]
_STATES = {state.value: state for state in TransactionState}


def encode(claim: Transaction, over: bytes | None = None) -> bytes:
    """Return the stored value of a claim.

    `over` is the value it replaces: fields which a newer version added to that value are kept.
    """
    packed: bytes = msgpack.packb(
        (
            VERSION,
            claim.claim_token,
            claim.claimant,
            claim.claim_time_ms,
            claim.expire_time_ms,
            claim.state.value,
            claim.payload_fingerprint,
            claim.completion_time_ms or 0,
            claim.result,
            *(msgpack.unpackb(over)[_FIELDS:] if over is not None else ()),
        )
    )
    return packed


def decode(value: bytes, namespace: str, transaction_id: str) -> Transaction:
    """Return the claim in `value`, or a claim by an unknown holder when this service did not write it.

    Raises UnreadableValue for another version and for a damaged value: either may be a live claim, so it is neither
    "go" nor "duplicate".
    """
    if len(value) > MAX_VALUE_BYTES:
        return unknown_holder(namespace, transaction_id)
    try:
        fields = msgpack.unpackb(value)
    except ValueError:
        # The errors of msgpack and of invalid UTF-8 are ValueErrors: this service did not write the value.
        fields = None
    if not isinstance(fields, list) or not fields or type(fields[0]) is not int:
        return unknown_holder(namespace, transaction_id)
    if fields[0] != VERSION:
        raise _unreadable(Reason.VALUE_VERSION_UNKNOWN)
    known = fields[:_FIELDS]
    if [type(field) for field in known] != _FIELD_TYPES or fields[5] not in _STATES:
        raise _unreadable(Reason.VALUE_DAMAGED)
    _, token, claimant, claim_time_ms, expire_time_ms, state, fingerprint, completion_time_ms, result = known
    return Transaction(
        namespace=namespace,
        transaction_id=transaction_id,
        claim_token=token,
        claimant=claimant,
        claim_time_ms=claim_time_ms,
        expire_time_ms=expire_time_ms,
        state=_STATES[state],
        payload_fingerprint=fingerprint,
        completion_time_ms=completion_time_ms or None,
        result=result,
    )


def _unreadable(reason: Reason) -> UnreadableValue:
    return UnreadableValue(reason, UNREADABLE[reason])


def unknown_holder(namespace: str, transaction_id: str, expire_time_ms: int | None = None) -> Transaction:
    """Return the claim for a value that this service did not write."""
    return Transaction(
        namespace, transaction_id, claim_token=None, claimant="", claim_time_ms=None, expire_time_ms=expire_time_ms
    )
