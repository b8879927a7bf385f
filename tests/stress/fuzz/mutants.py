"""The readers with one protection taken out each, which a fuzzer has to notice.

- `untyped-fields`: the fields of a stored value are taken as they come.
- `any-ttl`: the rules of a policy file need not hold together.
- `deep-toml`: nesting that the parser does not survive is no error of the file.
- `last-of-a-oneof`: of two members of a oneof the parser's choice counts.
"""

from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.message import DecodeError, Message

from dedup_service.api import decoding
from dedup_service.claims import FieldViolation, InvalidRequest
from dedup_service.server import policy_file
from dedup_service.stores import stored_value


class _Anything:
    """Equal to every list of types."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def _untyped_fields() -> None:
    stored_value._FIELD_TYPES = _Anything()  # type: ignore[assignment]


def _any_ttl() -> None:
    def contradictions(*_: object) -> Iterator[str]:
        return iter(())

    policy_file._contradictions = contradictions  # type: ignore[assignment]


def _deep_toml() -> None:
    policy_file.RecursionError = KeyError  # type: ignore[attr-defined]


def _last_of_a_oneof() -> None:
    def decode_request(request_type: type[Message], raw: bytes) -> Any:
        try:
            return request_type.FromString(raw)
        except DecodeError:
            raise InvalidRequest(FieldViolation("request", "is no message")) from None

    decoding.decode_request = decode_request


MUTATIONS: dict[str, tuple[str, Callable[[], None]]] = {
    "untyped-fields": ("stored-value", _untyped_fields),
    "any-ttl": ("policy-file", _any_ttl),
    "deep-toml": ("policy-file", _deep_toml),
    "last-of-a-oneof": ("request", _last_of_a_oneof),
}
"""The target that has to notice, and how to take the protection out."""
