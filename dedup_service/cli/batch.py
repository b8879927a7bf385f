"""`dedup-service batch`: claims every line of a file."""

import math
import os
import shlex
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from dedup.batches import claim_batch
from dedup.errors import CallFailed
from dedup.retries import RetryPolicy
from dedup.v1 import dedup_pb2_grpc
from dedup_service.cli.batch_lines import OUTCOMES, Defaults, Line, Record, read_chunks
from dedup_service.cli.connection import Server
from dedup_service.cli.options import (
    AsJson,
    Target,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    duration_option,
    positive_milliseconds_option,
    text_option,
)
from dedup_service.cli.output import ExitCode, error_fields, make_error, print_json, print_table

_STANDARD_INPUT = "-"
_FAILURES = "failures.jsonl"
_MAX_ATTEMPTS = 4
_FIRST_BACKOFF_S = 0.3
_MAX_BACKOFF_S = 1.2
_INTERRUPTED = make_error("CANCELLED", "", "unknown", "interrupted before the answer arrived")


def batch(
    file: Annotated[str, typer.Argument(help="Input file; - is standard input.", metavar="FILE", show_default=False)],
    *,
    namespace: Annotated[str, typer.Option(help="Namespace of lines that name none.")] = "default",
    ttl: Annotated[
        str | None,
        typer.Option(
            help="Lease of claims whose line sets none, such as 60s.  [default: the server's]", metavar="DURATION"
        ),
    ] = None,
    claimant: Annotated[str, typer.Option(help="Claimant of lines that name none.")] = "",
    chunk: Annotated[int, typer.Option(help="Lines per call.", min=1, max=1000)] = 500,
    results: Annotated[
        Path | None,
        typer.Option(
            help="New file for one JSON object per input line, with the claim tokens.  [default: none]",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    failures: Annotated[
        Path | None,
        typer.Option(
            help="New file for one JSON object per failed line, created with the first failure.  "
            f"[default: FILE.{_FAILURES}, or batch.{_FAILURES} for standard input]",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    target: Target = None,
    timeout: Annotated[str, typer.Option(help="Timeout of one call, such as 5s.", metavar="DURATION")] = "5s",
    as_json: AsJson = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Claim every line of a file.

    A line is a transaction id, or a JSON object with fields of ClaimTransactionRequest: transaction_id, namespace, ttl
    ("60s"), claim_token, claimant, payload_fingerprint (base64). Blank lines are skipped.

    Claims that fail because the server or its store is unavailable are repeated up to 3 times with the same tokens.

    Exit code 0: all claimed. 3: there were duplicates or mismatches. 1: a line failed. 130: Ctrl-C. 2: invalid usage;
    nothing was claimed.
    """
    defaults = Defaults(
        text_option("--namespace", namespace), duration_option("ttl", ttl), text_option("--claimant", claimant)
    )
    timeout_s = positive_milliseconds_option("timeout", timeout) / 1000
    failures = failures or Path(f"{'batch' if file == _STANDARD_INPUT else file}.{_FAILURES}")
    started = time.monotonic()
    interrupted = broken = False
    with (
        _opened(file) as stream,
        closing(Record(results, failures)) as record,
        Server(target, tls_ca, tls_cert, tls_key, token_file).connect() as channel,
        _progress(file, stream) as advance,
    ):
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        try:
            for lines in read_chunks(stream, defaults, chunk):
                try:
                    _claim(stub, lines, timeout_s)
                finally:
                    # Also after Ctrl-C: only this file has the tokens of these claims.
                    record.add(lines)
                advance(lines[-1])
        except KeyboardInterrupt:
            interrupted = True
        except OSError as error:
            # Claims whose tokens cannot be recorded must not be made.
            typer.echo(f"stopped: a file cannot be read or written: {error}", err=True)
            broken = True
    _print_summary(record, time.monotonic() - started, interrupted=interrupted, as_json=as_json)
    if interrupted:
        raise typer.Exit(ExitCode.INTERRUPTED)
    raise typer.Exit(ExitCode.ERROR if broken else _exit_code(record))


def _claim(stub: dedup_pb2_grpc.DedupServiceStub, lines: list[Line], timeout_s: float) -> None:
    """Claim the lines of one chunk and give each a response or an error.

    After KeyboardInterrupt, the error of an unanswered line says that the claim may have been made.
    """
    valid = [line for line in lines if line.request is not None]
    # The number of attempts is the limit, not a budget.
    policy = RetryPolicy(
        budget_s=math.inf,
        attempt_timeout_s=timeout_s,
        first_backoff_s=_FIRST_BACKOFF_S,
        max_backoff_s=_MAX_BACKOFF_S,
        max_attempts=_MAX_ATTEMPTS,
    )
    try:
        for index, answer in claim_batch(stub, [line.request for line in valid if line.request], policy=policy):
            if isinstance(answer, CallFailed):
                valid[index].error = error_fields(answer)
            else:
                valid[index].response = answer
    except KeyboardInterrupt:
        for line in valid:
            if line.response is None and line.error is None:
                line.error = _INTERRUPTED
        raise


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    if file == _STANDARD_INPUT:
        yield sys.stdin.buffer
        return
    with ExitStack() as exits:
        try:
            stream = exits.enter_context(Path(file).open("rb"))
        except OSError as error:
            raise typer.BadParameter(f"cannot be read: {error}", param_hint="FILE") from None
        yield stream


@contextmanager
def _progress(file: str, stream: BinaryIO) -> Iterator[Callable[[Line], None]]:
    """Yield a function that shows the last answered line on standard error."""
    # Imported late: rich would take a sixth of the start of every command.
    from rich.console import Console  # noqa: PLC0415 - as above
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415 - as above

    status = os.fstat(stream.fileno()) if file != _STANDARD_INPUT else None
    # In bytes: counting the lines would read the file twice. A pipe has no size.
    total = status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    quiet = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("claiming", total=total)
        yield lambda line: progress.update(task, completed=line.end_position, description=f"line {line.number:,}")


def _print_summary(record: Record, seconds: float, *, interrupted: bool, as_json: bool) -> None:
    failures = str(record.failures) if record.failures_written else None
    counts = {name: record.counts[name] for name in (*OUTCOMES.values(), "failed")}
    if as_json:
        more = {"shadow_duplicate": record.shadow_duplicates, "seconds": round(seconds, 3), "failures_file": failures}
        print_json(counts | more | {"interrupted": interrupted})
        return
    rows = {name: f"{count:,}" for name, count in counts.items()}
    if record.shadow_duplicates:
        rows["claimed"] += f" ({record.shadow_duplicates:,} shadow duplicates)"
    headline = "DONE, WITH FAILURES" if failures else "DONE"
    print_table(
        "INTERRUPTED" if interrupted else headline,
        rows | {"seconds": f"{seconds:.2f}", "failures in": failures or ""},
    )
    if failures:
        typer.echo(
            "To repeat these claims with the same tokens: "
            f"jq -c '.request // empty' {shlex.quote(failures)} | dedup-service batch -"
        )


def _exit_code(record: Record) -> int:
    if record.counts["failed"]:
        return ExitCode.ERROR
    return ExitCode.DUPLICATE if record.counts["duplicate"] or record.counts["mismatch"] else 0
