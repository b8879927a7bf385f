"""`dedup-service hash-id`: what stands in the log for an id, to find its lines with. It asks no server."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dedup_service.cli.options import text_option
from dedup_service.cli.show import print_json
from dedup_service.config.settings import CONFIG_VARIABLE, ENV_PREFIX, load_settings
from dedup_service.server.log_ids import logged_ids


def hash_id(
    transaction_ids: Annotated[
        list[str],
        typer.Argument(
            help="The ids of the transactions; - reads them from standard input, one a line.",
            metavar="ID...",
            show_default=False,
        ),
    ],
    *,
    config: Annotated[
        Path | None, typer.Option(help=f"A TOML file of settings.  [env: {CONFIG_VARIABLE}]", show_default=False)
    ] = None,
    log_id_key_file: Annotated[
        Path | None,
        typer.Option(
            help="The file with the key that the server hashes ids with.  "
            f"[env: {ENV_PREFIX}LOG_ID_KEY_FILE] [default: none, plain SHA-256]",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line, with the id and its hash.")
    ] = False,
) -> None:
    """Print what stands in the log of the server for each id, one a line in their order.

    The settings have to be those of the server, DEDUP_LOG_ID_KEY_FILE above all.

    Exit code 0: printed. 2: bad usage, or a key file that cannot be used.
    """
    flags = {} if log_id_key_file is None else {"log_id_key_file": log_id_key_file}
    ids = logged_ids(load_settings(flags, config))
    for transaction_id in _each(transaction_ids):
        shown = ids.shown(transaction_id)
        if as_json:
            print_json({"transaction_id": transaction_id, "transaction": shown})
        else:
            typer.echo(shown)


def _each(transaction_ids: Sequence[str]) -> Iterator[str]:
    for argument in transaction_ids:
        if argument != "-":
            yield text_option("ID", argument)
            continue
        for number, raw in enumerate(sys.stdin.buffer, 1):
            try:
                # An id may end in blanks; the end of its line is no part of it.
                line = raw.removesuffix(b"\n").removesuffix(b"\r").decode()
            except UnicodeDecodeError:
                raise typer.BadParameter(f"line {number} is not valid UTF-8", param_hint="ID") from None
            if line:
                yield line
