"""`dedup-service watch`: polls a transaction until it ends."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Protocol

import grpc
import typer

from dedup.error_details import failure_of_call
from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.cli.connection import Server
from dedup_service.cli.options import (
    Namespace,
    Target,
    Timeout,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    TransactionId,
    milliseconds_option,
    positive_milliseconds_option,
    text_option,
)
from dedup_service.cli.output import (
    ExitCode,
    as_dict,
    claimant_word,
    error_fields,
    fail,
    local_time,
    print_transaction,
    state_word,
)

# Imported late below: rich would take a sixth of the start of every command.
if TYPE_CHECKING:
    from rich.console import Console, Group

# The codes of a server's shutdown do not say what happened.
_VAGUE_CODES = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
_OUTAGE_CODES = (grpc.StatusCode.UNAVAILABLE, *_VAGUE_CODES)
_REFRESH_PER_SECOND = 4

# A claim gone this close to its expiry may have expired by the server's clock.
_CLOCK_MARGIN_MS = 2_000


def watch(
    transaction_id: TransactionId,
    *,
    namespace: Namespace = "default",
    interval: Annotated[
        str, typer.Option(help="Minimum time between two look-ups, such as 500ms.", metavar="DURATION")
    ] = "500ms",
    target: Target = None,
    timeout: Timeout = "5s",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line for each change, also for errors.")
    ] = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Watch a transaction until it ends, without changing it.

    On a terminal the view is refreshed in place; elsewhere each change is printed as a line. During an outage of the
    server the command reports the outage and continues.

    Exit code 0: completed. 5: not claimed, or no longer. 130: Ctrl-C. 2: invalid usage. 1: any other error.
    """
    request = dedup_pb2.GetTransactionRequest(
        transaction_id=text_option("ID", transaction_id), namespace=text_option("--namespace", namespace)
    )
    interval_s = positive_milliseconds_option("interval", interval) / 1000
    timeout_s = milliseconds_option("timeout", timeout) / 1000
    server = Server(target, tls_ca, tls_cert, tls_key, token_file)
    try:
        with server.connect() as channel, closing(_open_view(transaction_id, as_json=as_json)) as view:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            last = _follow(_poll(stub, request, timeout_s=timeout_s, interval_s=interval_s), view)
    except grpc.RpcError as error:
        fail(failure_of_call(error), as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    raise typer.Exit(0 if last.transaction else ExitCode.NOT_FOUND)


@dataclass(frozen=True)
class Snapshot:
    """One look-up: a transaction, an outage, or neither if the transaction is not claimed.

    `likely` is the probable end of a claim that is gone: "released", "expired", or "" if unknown.
    """

    transaction: dedup_pb2.Transaction | None = None
    outage: dict[str, str] | None = None
    likely: str = ""

    @property
    def state(self) -> str:
        """The state as one word, as in the JSON output."""
        if self.transaction is not None:
            return dedup_pb2.TransactionState.Name(self.transaction.state).removeprefix("TRANSACTION_STATE_")
        return "UNKNOWN" if self.outage else "NOT_FOUND"

    def same_as(self, other: "Snapshot | None") -> bool:
        """Return whether both print alike; of an outage only code and reason count."""
        if other is None or (self.outage is None) != (other.outage is None):
            return False
        if self.outage and other.outage:
            return all(self.outage[field] == other.outage[field] for field in ("code", "reason"))
        return self.transaction == other.transaction


def _follow(snapshots: Iterator[Snapshot], view: "_View") -> Snapshot:
    """Show snapshots until the transaction ends; return the last one."""
    held: dedup_pb2.Transaction | None = None
    for snapshot in snapshots:
        if snapshot.state == "NOT_FOUND":
            last = Snapshot(likely=_likely_end(held))
            view.end(last)
            return last
        if snapshot.transaction is not None and snapshot.transaction.state == dedup_pb2.TRANSACTION_STATE_COMPLETED:
            view.end(snapshot)
            return snapshot
        held = snapshot.transaction or held
        view.show(snapshot)
    raise AssertionError("polling never ends by itself")


def _likely_end(held: dedup_pb2.Transaction | None) -> str:
    if held is None or not held.HasField("expire_time"):
        return ""
    left_ms = held.expire_time.ToMilliseconds() - time.time() * 1000
    if left_ms <= 0:
        return "expired"
    return "released" if left_ms > _CLOCK_MARGIN_MS else ""


def _poll(
    stub: dedup_pb2_grpc.DedupServiceStub,
    request: dedup_pb2.GetTransactionRequest,
    *,
    timeout_s: float,
    interval_s: float,
) -> Iterator[Snapshot]:
    outage: dict[str, str] | None = None
    while True:
        started = time.monotonic()
        snapshot = _look_up(stub, request, timeout_s, outage)
        outage = snapshot.outage
        yield snapshot
        time.sleep(max(0.0, started + interval_s - time.monotonic()))


def _look_up(
    stub: dedup_pb2_grpc.DedupServiceStub,
    request: dedup_pb2.GetTransactionRequest,
    timeout_s: float,
    outage: dict[str, str] | None,
) -> Snapshot:
    try:
        # In an outage, wait for the connection: failing at once leaves no time to reconnect.
        reply = stub.GetTransaction(request, timeout=timeout_s, wait_for_ready=outage is not None)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return Snapshot()
        if outage is not None and error.code() in _VAGUE_CODES:
            # The first error of an outage says more.
            return Snapshot(outage=outage)
        if error.code() in _OUTAGE_CODES:
            return Snapshot(outage=error_fields(failure_of_call(error)))
        raise
    return Snapshot(transaction=reply.transaction)


class _View(Protocol):
    """Shows snapshots. `close` is always called at the end."""

    def show(self, snapshot: Snapshot) -> None:
        """Show a snapshot, possibly the previous one again."""

    def end(self, snapshot: Snapshot) -> None:
        """Show the last snapshot."""

    def close(self) -> None:
        """Restore the terminal."""


def _open_view(transaction_id: str, *, as_json: bool) -> _View:
    if as_json:
        return _JsonLines()
    from rich.console import Console  # noqa: PLC0415 - late, as above

    console = Console(markup=False, highlight=False)
    if sys.stdout.isatty() and console.is_interactive:
        return _InPlace(transaction_id, console)
    return _Lines(transaction_id)


class _JsonLines:
    """Prints one JSON object a line for each change."""

    def __init__(self) -> None:
        self._last: Snapshot | None = None

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.same_as(self._last):
            return
        self._last = snapshot
        fields: dict[str, object] = {"time": datetime.now(UTC).isoformat(), "state": snapshot.state}
        fields["transaction"] = as_dict(snapshot.transaction) if snapshot.transaction else None
        if snapshot.outage:
            fields["error"] = snapshot.outage
        if snapshot.likely:
            fields["likely"] = snapshot.likely
        typer.echo(json.dumps(fields, ensure_ascii=False))

    def end(self, snapshot: Snapshot) -> None:
        self._last = None
        self.show(snapshot)

    def close(self) -> None:
        pass


class _Lines:
    """Prints a line of text for each change."""

    def __init__(self, transaction_id: str) -> None:
        self._transaction_id = transaction_id
        self._last: Snapshot | None = None

    def show(self, snapshot: Snapshot) -> None:
        if snapshot.same_as(self._last):
            return
        self._last = snapshot
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="milliseconds")
        if snapshot.outage:
            typer.echo(f"{now}  {_outage_text(snapshot.outage)}")
        elif snapshot.transaction:
            fields = ", ".join(f"{name} {value}" for name, value in _live_rows(snapshot.transaction).items())
            typer.echo(f"{now}  {fields}")

    def end(self, snapshot: Snapshot) -> None:
        _print_end(self._transaction_id, snapshot)

    def close(self) -> None:
        pass


class _InPlace:
    """Redraws a table; the time left counts down between look-ups."""

    def __init__(self, transaction_id: str, console: "Console") -> None:
        from rich.live import Live  # noqa: PLC0415 - late, as above

        self._transaction_id = transaction_id
        self._snapshot: Snapshot | None = None
        self._transaction: dedup_pb2.Transaction | None = None
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=_REFRESH_PER_SECOND, transient=True
        )
        self._live.start()

    def show(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        # In an outage the last known state stays visible.
        self._transaction = snapshot.transaction or self._transaction

    def end(self, snapshot: Snapshot) -> None:
        self.close()
        _print_end(self._transaction_id, snapshot)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> "Group":
        from rich.console import Group  # noqa: PLC0415 - late, as above
        from rich.table import Table  # noqa: PLC0415 - late, as above
        from rich.text import Text  # noqa: PLC0415 - late, as above

        parts: list[Text | Table] = [Text(f"WATCHING {self._transaction_id}")]
        if self._transaction is not None:
            table = Table.grid(padding=(0, 2))
            for name, value in _live_rows(self._transaction).items():
                table.add_row(f"  {name}", value)
            parts.append(table)
        if self._snapshot is not None and self._snapshot.outage:
            parts.append(Text(_outage_text(self._snapshot.outage)))
        return Group(*parts)


def _live_rows(transaction: dedup_pb2.Transaction) -> dict[str, str]:
    left = "unknown"
    if transaction.HasField("expire_time"):
        seconds = int(transaction.expire_time.ToMilliseconds() / 1000 - time.time())
        left = str(timedelta(seconds=max(0, seconds)))
    return {
        "state": state_word(transaction),
        "claimant": claimant_word(transaction),
        "since": local_time(transaction, "claim_time") or "unknown",
        "time left": left,
    }


def _outage_text(error: dict[str, str]) -> str:
    return f"{error['code']}: {error['message']}: retrying"


def _print_end(transaction_id: str, snapshot: Snapshot) -> None:
    if snapshot.transaction is not None:
        print_transaction("COMPLETED", snapshot.transaction)
        return
    ends = {"expired": ": it probably expired", "released": ": it was probably released"}
    typer.echo(f"NOT FOUND: {transaction_id} is not claimed{ends.get(snapshot.likely, '')}")
