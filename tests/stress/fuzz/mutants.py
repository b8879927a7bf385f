"""The parsers with one protection removed each, which the fuzzer must notice.

- `untyped-fields`: the types of the fields of a stored value are not checked.
- `any-ttl`: contradictions in a policy file are not rejected.
- `deep-toml`: TOML nested too deep for the parser is not reported as an error of the file.
- `last-of-a-oneof`: two members of a oneof are accepted, and the parser keeps the last.
"""

from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.message import DecodeError, Message

from dedup_service.api import decoding
from dedup_service.claims import FieldViolation, InvalidRequest
from dedup_service.config import files
from dedup_service.server import policies
from dedup_service.stores import stored_value


class _Anything:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def _untyped_fields() -> None:
    stored_value._FIELD_TYPES = _Anything()  # type: ignore[assignment]


def _any_ttl() -> None:
    def contradictions(*_: object) -> Iterator[str]:
        return iter(())

    policies._contradictions = contradictions  # type: ignore[assignment]


def _deep_toml() -> None:
    files.RecursionError = KeyError  # type: ignore[attr-defined]


def _last_of_a_oneof() -> None:
    async def decode_request(request_type: type[Message], raw: bytes) -> Any:
        try:
            return request_type.FromString(raw)
        except DecodeError:
            raise InvalidRequest(FieldViolation("request", "is not a message")) from None

    decoding.decode_request = decode_request


MUTATIONS: dict[str, tuple[str, Callable[[], None]]] = {
    "untyped-fields": ("stored-value", _untyped_fields),
    "any-ttl": ("policy-file", _any_ttl),
    "deep-toml": ("policy-file", _deep_toml),
    "last-of-a-oneof": ("request", _last_of_a_oneof),
}
"""The target that must notice, and the function that removes the protection."""
