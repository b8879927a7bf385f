"""The key of a transaction. Two different pairs of namespace and id never share one."""

from collections.abc import Callable

from dedup_service.claims import DEFAULT_NAMESPACE, FieldViolation, InvalidRequest

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
