"""What `dedup-service batch` writes: the summary, the results and the failures. Tokens are for their owner alone."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import typer

from dedup.v1 import dedup_pb2
from dedup_service.cli.batch_lines import Line
from dedup_service.cli.show import as_dict

OUTCOMES = {
    dedup_pb2.CLAIM_OUTCOME_CLAIMED: "claimed",
    dedup_pb2.CLAIM_OUTCOME_DUPLICATE: "duplicate",
    dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH: "mismatch",
}


class Record:
    """Counts what became of the lines, and writes it down.

    Raises a usage error that names the flag, before anything is claimed, when a file is there already or cannot be
    written. `results` is made at once, `failures` with the first failure; both are readable by their owner alone.
    """

    def __init__(self, results: Path | None, failures: Path) -> None:
        self.counts: Counter[str] = Counter()
        self.shadow_duplicates = 0
        self.failures = failures
        self._exits = ExitStack()
        self._failures_file: TextIO | None = None
        self._results_file: TextIO | None = None
        if results is not None and results.absolute() == failures.absolute():
            raise typer.BadParameter("is the file of the results as well", param_hint="--failures")
        _check_new(failures, "--failures")
        if results is not None:
            _check_new(results, "--results")
            try:
                self._results_file = self._open(results)
            except OSError as error:
                raise typer.BadParameter(f"cannot be written: {error}", param_hint="--results") from None

    @property
    def failures_written(self) -> bool:
        """Whether there is a file of failures."""
        return self._failures_file is not None

    def add(self, lines: Iterable[Line]) -> None:
        """Count and write the lines of one chunk, and hand them to the system. Raises OSError."""
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
        # O_EXCL also when the file came after the check: the tokens in it may be all that is left of somebody's claims.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return self._exits.enter_context(os.fdopen(descriptor, "w", encoding="utf-8"))


def _check_new(path: Path, flag: str) -> None:
    if path.exists() or path.is_symlink():
        raise typer.BadParameter(f"{str(path)!r} is there already: move it away or name another", param_hint=flag)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{str(path)!r} cannot be made in its folder: name another", param_hint=flag)


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
    # Otherwise a reader would take the token for one that holds the transaction.
    return fields | ({"shadow_duplicate": True} if line.response.shadow_duplicate else {})


def _failure(line: Line) -> dict[str, object]:
    fields: dict[str, object] = {"line": line.number, "input": line.text, "error": line.error}
    if line.request is not None:
        # With its token, so that it can be repeated as the same claim.
        fields["request"] = as_dict(line.request)
    return fields


def _in_doubt(line: Line) -> bool:
    return line.error is not None and line.error["applied"] != "no"
