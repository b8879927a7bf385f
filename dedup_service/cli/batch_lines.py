"""Input, results and failures of `dedup-service batch`, one claim a line."""

import base64
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import ParseDict, ParseError

from dedup.v1 import dedup_pb2
from dedup_service.cli.output import as_dict, make_error

OUTCOMES = {
    dedup_pb2.CLAIM_OUTCOME_CLAIMED: "claimed",
    dedup_pb2.CLAIM_OUTCOME_DUPLICATE: "duplicate",
    dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH: "mismatch",
}

# Enough for the longest valid claim; a thousand of them fit into one gRPC message.
MAX_LINE_BYTES = 4_000
_BOM = b"\xef\xbb\xbf"


@dataclass
class Line:
    """One input line and its `response` or `error`. An unreadable line has no `request`."""

    number: int
    text: str
    request: dedup_pb2.ClaimTransactionRequest | None = None
    response: dedup_pb2.ClaimTransactionResponse | None = None
    error: dict[str, str] | None = None
    end_position: int = 0


@dataclass(frozen=True)
class Defaults:
    """Values for lines that do not set them."""

    namespace: str
    ttl: Duration | None
    claimant: str


def read_chunks(stream: BinaryIO, defaults: Defaults, size: int) -> Iterator[list[Line]]:
    """Yield the non-blank lines, each claim with its token, `size` at a time without reading ahead."""
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
            # Some editors write a byte order mark.
            raw = raw.removeprefix(_BOM)
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if not raw.strip():
            continue
        line = Line(number, raw.decode("utf-8", "backslashreplace"), end_position=position)
        try:
            if too_long:
                raise ValueError(f"is longer than {MAX_LINE_BYTES} bytes, which no valid claim is")  # noqa: TRY301
            line.request = _request(raw, defaults)
        except (ValueError, ParseError, RecursionError) as error:
            line.error = make_error("INVALID_ARGUMENT", "BAD_LINE", "no", _sentence(error))
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
    # One token for all attempts: a repeated claim must not be its own duplicate.
    request.claim_token = request.claim_token or secrets.token_urlsafe(16)
    return request


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("sets a field twice")
    return fields


def _check_base64(fields: dict[str, Any], request: dedup_pb2.ClaimTransactionRequest) -> None:
    # protobuf ignores characters outside base64, and an empty fingerprint is never compared.
    written = fields.get("payload_fingerprint", fields.get("payloadFingerprint")) or ""
    read = base64.b64encode(request.payload_fingerprint).decode()
    if written.replace("-", "+").replace("_", "/").rstrip("=") != read.rstrip("="):
        raise ValueError("payload_fingerprint is not base64")


def _sentence(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "is not valid UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"is not a JSON object: {error}"
    return "is nested too deeply" if isinstance(error, RecursionError) else str(error)


class Record:
    """Counts the answers and writes the files of results and failures.

    Creates `results` at once and `failures` with the first failure, readable by the owner only: both contain tokens.
    Raises a usage error that names the flag if a file exists or cannot be created.
    """

    def __init__(self, results: Path | None, failures: Path) -> None:
        self.counts: Counter[str] = Counter()
        self.shadow_duplicates = 0
        self.failures = failures
        self._exits = ExitStack()
        self._failures_file: TextIO | None = None
        self._results_file: TextIO | None = None
        if results is not None and results.absolute() == failures.absolute():
            raise typer.BadParameter("must differ from --results", param_hint="--failures")
        _check_new(failures, "--failures")
        if results is not None:
            _check_new(results, "--results")
            try:
                self._results_file = self._open(results)
            except OSError as error:
                raise typer.BadParameter(f"cannot be written: {error}", param_hint="--results") from None

    @property
    def failures_written(self) -> bool:
        """Whether `failures` was created."""
        return self._failures_file is not None

    def add(self, lines: Iterable[Line]) -> None:
        """Count, write and flush the lines of one chunk. Raises OSError."""
        for line in lines:
            self.counts["failed" if line.response is None else OUTCOMES[line.response.outcome]] += 1
            if line.response is None:
                if self._failures_file is None:
                    self._failures_file = self._open(self.failures)
                _write(self._failures_file, _failure(line))
            elif line.response.shadow_duplicate:
                self.shadow_duplicates += 1
            if self._results_file is not None:
                _write(self._results_file, _result(line))
        for file in (self._failures_file, self._results_file):
            if file is not None:
                file.flush()

    def close(self) -> None:
        """Close the files."""
        self._exits.close()

    def _open(self, path: Path) -> TextIO:
        # O_EXCL although checked before: an existing file may hold the only copy of other claims' tokens.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return self._exits.enter_context(os.fdopen(descriptor, "w", encoding="utf-8"))


def _check_new(path: Path, flag: str) -> None:
    if path.exists() or path.is_symlink():
        raise typer.BadParameter(f"{str(path)!r} exists already: move it away or choose another name", param_hint=flag)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{str(path)!r} cannot be created in its folder: choose another path", param_hint=flag)


def _write(file: TextIO, fields: dict[str, object]) -> None:
    file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _result(line: Line) -> dict[str, object]:
    fields: dict[str, object] = {
        "line": line.number,
        "transaction_id": line.request.transaction_id if line.request else None,
    }
    if line.response is None:
        token = line.request.claim_token if line.request and _in_doubt(line) else None
        return fields | {"outcome": "FAILED", "claim_token": token, "transaction": None}
    fields |= {
        "outcome": dedup_pb2.ClaimOutcome.Name(line.response.outcome),
        "claim_token": line.response.claim_token or None,
        "transaction": as_dict(line.response.transaction),
    }
    # The token of a shadow duplicate does not hold the transaction.
    return fields | ({"shadow_duplicate": True} if line.response.shadow_duplicate else {})


def _failure(line: Line) -> dict[str, object]:
    fields: dict[str, object] = {"line": line.number, "input": line.text, "error": line.error}
    if line.request is not None:
        # Includes the token, so that the same claim can be repeated.
        fields["request"] = as_dict(line.request)
    return fields


def _in_doubt(line: Line) -> bool:
    return line.error is not None and line.error["applied"] != "no"
