"""How `dedup-service watch` shows what it sees: in place on a terminal, as lines, or as JSON objects."""

import json
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dedup.v1 import dedup_pb2
from dedup_service.cli.show import as_dict, print_transaction, state_word, when

_REFRESH_PER_SECOND = 4


@dataclass(frozen=True)
class Look:
    """What one look found: a transaction, an error that may pass, or neither when nobody holds the transaction.

    Without a holder `likely` says how the last one ended, as far as that is known: "released", "expired" or "".
    """

    transaction: dedup_pb2.Transaction | None = None
    outage: dict[str, str] | None = None
    likely: str = ""

    @property
    def state(self) -> str:
        """The state in one word of JSON."""
        if self.transaction is not None:
            return dedup_pb2.TransactionState.Name(self.transaction.state).removeprefix("TRANSACTION_STATE_")
        return "UNKNOWN" if self.outage else "NOT_FOUND"

    def same_as(self, other: "Look | None") -> bool:
        """Return whether there is nothing to tell after `other`; the words of an outage may change within it."""
        if other is None or (self.outage is None) != (other.outage is None):
            return False
        if self.outage and other.outage:
            return all(self.outage[field] == other.outage[field] for field in ("code", "reason"))
        return self.transaction == other.transaction


class View(Protocol):
    """Shows looks as they come; `close` is called at the end, whatever it was."""

    def show(self, look: Look) -> None:
        """Show one look, which may be the same as the one before."""

    def end(self, look: Look) -> None:
        """Show the look after which there are no more."""

    def close(self) -> None:
        """Leave the terminal in order."""


def open_view(transaction_id: str, *, as_json: bool) -> View:
    """Return the view that fits what standard output is."""
    if as_json:
        return JsonLines()
    console = Console(markup=False, highlight=False)
    if sys.stdout.isatty() and console.is_interactive:
        return InPlace(transaction_id, console)
    return Lines(transaction_id)


class JsonLines:
    """One JSON object a line for each change."""

    def __init__(self) -> None:
        self._last: Look | None = None

    def show(self, look: Look) -> None:
        """Print a change."""
        if look.same_as(self._last):
            return
        self._last = look
        fields: dict[str, object] = {"time": datetime.now(UTC).isoformat(), "state": look.state}
        fields["transaction"] = as_dict(look.transaction) if look.transaction else None
        if look.outage:
            fields["error"] = look.outage
        if look.likely:
            fields["likely"] = look.likely
        typer.echo(json.dumps(fields, ensure_ascii=False))

    def end(self, look: Look) -> None:
        """Print the last change."""
        self._last = None
        self.show(look)

    def close(self) -> None:
        """Nothing to put in order."""


class Lines:
    """One line of text for each change."""

    def __init__(self, transaction_id: str) -> None:
        self._transaction_id = transaction_id
        self._last: Look | None = None

    def show(self, look: Look) -> None:
        """Print a change."""
        if look.same_as(self._last):
            return
        self._last = look
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="milliseconds")
        if look.outage:
            typer.echo(f"{now}  {_outage(look.outage)}")
        elif look.transaction:
            words = (f"{name} {value}" for name, value in _live_rows(look.transaction).items() if value)
            typer.echo(f"{now}  {', '.join(words)}")

    def end(self, look: Look) -> None:
        """Print how it ended."""
        _print_end(self._transaction_id, look)

    def close(self) -> None:
        """Nothing to put in order."""


class InPlace:
    """A table on a terminal that is drawn anew in its place; the time left goes on between two looks."""

    def __init__(self, transaction_id: str, console: Console) -> None:
        self._transaction_id = transaction_id
        self._look: Look | None = None
        self._transaction: dedup_pb2.Transaction | None = None
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=_REFRESH_PER_SECOND, transient=True
        )
        self._live.start()

    def show(self, look: Look) -> None:
        """Draw a look at the next refresh."""
        self._look = look
        # During an outage the last that was known stays in view.
        self._transaction = look.transaction or self._transaction

    def end(self, look: Look) -> None:
        """Replace the table by how it ended."""
        self.close()
        _print_end(self._transaction_id, look)

    def close(self) -> None:
        """Take the table away."""
        self._live.stop()

    def _render(self) -> Group:
        parts: list[Text | Table] = [Text(f"WATCHING {self._transaction_id}")]
        if self._transaction is not None:
            table = Table.grid(padding=(0, 2))
            for name, value in _live_rows(self._transaction).items():
                table.add_row(f"  {name}", value)
            parts.append(table)
        if self._look is not None and self._look.outage:
            parts.append(Text(_outage(self._look.outage)))
        return Group(*parts)


def _live_rows(transaction: dedup_pb2.Transaction) -> dict[str, str]:
    left = ""
    if transaction.HasField("expire_time"):
        seconds = int(transaction.expire_time.ToMilliseconds() / 1000 - time.time())
        left = str(timedelta(seconds=max(0, seconds)))
    return {
        "state": state_word(transaction),
        "claimant": transaction.claimant or "not said",
        "since": when(transaction, "claim_time") or "unknown",
        "time left": left or "unknown",
    }


def _outage(error: dict[str, str]) -> str:
    return f"{error['code']}: {error['message']}: trying again"


def _print_end(transaction_id: str, look: Look) -> None:
    if look.transaction is not None:
        print_transaction("COMPLETED", look.transaction)
        return
    ends = {"expired": ": it expired, most likely", "released": ": it was released, most likely"}
    typer.echo(f"NOT FOUND: nobody holds {transaction_id}{ends.get(look.likely, '')}")
