"""What `dedup-service batch` reads: one claim a line, as an id or as a JSON object, and never more than one chunk."""

import base64
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict, ParseError

from dedup.v1 import dedup_pb2
from dedup_service.cli.channel import failure

# The longest claim of the contract fits in, and a thousand of them into one gRPC message.
MAX_LINE_BYTES = 4_000
_BOM = b"\xef\xbb\xbf"


@dataclass
class Line:
    """One line of the input and what has become of it; `request` is None when the line asks for nothing readable."""

    number: int
    text: str
    request: dedup_pb2.ClaimTransactionRequest | None = None
    response: dedup_pb2.ClaimTransactionResponse | None = None
    error: dict[str, str] | None = None
    end_position: int = 0

    def fail(self, error: dict[str, str]) -> None:
        """Note an error; once an attempt may have been applied, no later one can take that doubt away."""
        if self.error is not None and self.error["applied"] != "no":
            error = error | {"applied": self.error["applied"]}
        self.error = error


@dataclass(frozen=True)
class Defaults:
    """What holds for a line that does not say."""

    namespace: str
    ttl: Duration | None
    claimant: str


def read_chunks(stream: BinaryIO, defaults: Defaults, size: int) -> Iterator[list[Line]]:
    """Yield the lines of `stream` that are not blank, `size` at a time; each claim has its token already."""
    lines = _read_lines(stream, defaults)
    while chunk := list(islice(lines, size)):
        yield chunk


def _read_lines(stream: BinaryIO, defaults: Defaults) -> Iterator[Line]:
    number = position = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        position += len(raw)
        too_long = len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n")
        rest = raw
        while too_long and rest and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE_BYTES)
            position += len(rest)
        if number == 1:
            # An editor's mark at the head of a file is no part of the first id.
            raw = raw.removeprefix(_BOM)
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if not raw.strip():
            continue
        line = Line(number, raw.decode("utf-8", "backslashreplace"), end_position=position)
        try:
            if too_long:
                raise ValueError(f"is longer than {MAX_LINE_BYTES} bytes: no claim is that long")  # noqa: TRY301
            line.request = _request(raw, defaults)
        except (ValueError, ParseError, RecursionError) as error:
            line.fail(failure("INVALID_ARGUMENT", "BAD_LINE", "no", _sentence(error)))
        yield line


def _request(raw: bytes, defaults: Defaults) -> dedup_pb2.ClaimTransactionRequest:
    text = raw.decode()
    request = dedup_pb2.ClaimTransactionRequest()
    if text.lstrip().startswith("{"):
        fields = json.loads(text, object_pairs_hook=_each_once)
        ParseDict(fields, request)
        _check_base64(fields, request)
    else:
        request.transaction_id = text
    request.namespace = request.namespace or defaults.namespace
    request.claimant = request.claimant or defaults.claimant
    if request.WhichOneof("expiry") is None and defaults.ttl is not None:
        request.ttl.CopyFrom(defaults.ttl)
    # Before the first attempt, so that every attempt is the same claim.
    request.claim_token = request.claim_token or secrets.token_urlsafe(16)
    return request


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("says a field twice")
    return fields


def _check_base64(fields: dict[str, Any], request: dedup_pb2.ClaimTransactionRequest) -> None:
    # protobuf skips what is no base64, and a fingerprint that comes out empty is never compared.
    said = fields.get("payload_fingerprint", fields.get("payloadFingerprint")) or ""
    read = base64.b64encode(request.payload_fingerprint).decode()
    if said.replace("-", "+").replace("_", "/").rstrip("=") != read.rstrip("="):
        raise ValueError("payload_fingerprint is not base64")


def _sentence(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "is not valid UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"is no JSON object: {error}"
    return "is nested too deeply" if isinstance(error, RecursionError) else str(error)
