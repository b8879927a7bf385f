"""`dedup-service batch`: claims every line of a file."""

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
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dedup.v1 import dedup_pb2_grpc
from dedup_service.cli import exit_codes
from dedup_service.cli.batch_call import claim_lines
from dedup_service.cli.batch_files import OUTCOMES, Record
from dedup_service.cli.batch_lines import Defaults, Line, read_chunks
from dedup_service.cli.channel import open_channel
from dedup_service.cli.options import (
    AsJson,
    Target,
    duration_option,
    positive_milliseconds_option,
    text_option,
)
from dedup_service.cli.show import print_json, print_table

_STANDARD_INPUT = "-"
_FAILURES = "failures.jsonl"


def batch(
    file: Annotated[str, typer.Argument(help="The file; - is standard input.", metavar="FILE", show_default=False)],
    *,
    namespace: Annotated[str, typer.Option(help="The namespace of lines that name none.")] = "default",
    ttl: Annotated[
        str | None,
        typer.Option(
            help="How long a claim lives whose line does not say, such as 60s.  [default: the server's]",
            metavar="DURATION",
        ),
    ] = None,
    claimant: Annotated[str, typer.Option(help="Who claims, for lines that do not say.")] = "",
    chunk: Annotated[int, typer.Option(help="How many lines go into one call.", min=1, max=1000)] = 500,
    results: Annotated[
        Path | None,
        typer.Option(
            help="A new file for one JSON object a line of the input, with the tokens of the claims.  [default: none]",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    failures: Annotated[
        Path | None,
        typer.Option(
            help="A new file for one JSON object a line that failed; made only when one does.  "
            f"[default: FILE.{_FAILURES}, or batch.{_FAILURES} for standard input]",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    target: Target = None,
    timeout: Annotated[
        str, typer.Option(help="How long to wait for the answer to one call, such as 5s.", metavar="DURATION")
    ] = "5s",
    as_json: AsJson = False,
) -> None:
    """Claim every line of a file.

    A line is the id of a transaction, or a JSON object with fields of ClaimTransactionRequest: transaction_id,
    namespace, ttl ("60s"), claim_token, claimant, payload_fingerprint (base64). Blank lines are skipped.

    What fails because the server or its store is away is repeated up to 3 times, with the same tokens.

    Exit code 0: all claimed. 3: there were duplicates or mismatches. 1: a line failed. 130: Ctrl-C. 2: bad usage, and
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
        open_channel(target) as channel,
        _progress(file, stream) as advance,
    ):
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        try:
            for lines in read_chunks(stream, defaults, chunk):
                try:
                    claim_lines(stub, lines, timeout_s)
                finally:
                    # Also when it was interrupted: what was claimed by then has tokens that nobody else knows.
                    record.add(lines)
                advance(lines[-1])
        except KeyboardInterrupt:
            interrupted = True
        except OSError as error:
            # Without a place for the tokens nothing more is claimed.
            typer.echo(f"stopped, since a file failed: {error}", err=True)
            broken = True
    _print_summary(record, time.monotonic() - started, interrupted=interrupted, as_json=as_json)
    if interrupted:
        raise typer.Exit(exit_codes.INTERRUPTED)
    raise typer.Exit(exit_codes.ERROR if broken else _exit_code(record))


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
    """Yield a function that takes the last line that was answered, and show it on standard error."""
    status = os.fstat(stream.fileno()) if file != _STANDARD_INPUT else None
    # Bytes, since counting the lines would read the file twice; a pipe has no size.
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
            "The requests in that file can be claimed again as they are, with the same tokens: "
            f"jq -c '.request // empty' {shlex.quote(failures)} | dedup-service batch -"
        )


def _exit_code(record: Record) -> int:
    if record.counts["failed"]:
        return exit_codes.ERROR
    return exit_codes.DUPLICATE if record.counts["duplicate"] or record.counts["mismatch"] else 0
