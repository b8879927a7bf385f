"""`dedup-service hash-id`: prints transaction ids as the log shows them, without a server."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dedup_service.cli.options import ConfigFile, text_option
from dedup_service.cli.output import print_json
from dedup_service.config.files import read_log_id_key
from dedup_service.config.settings import ENV_PREFIX, load_settings
from dedup_service.observability.logs import LoggedIds


def hash_id(
    transaction_ids: Annotated[
        list[str],
        typer.Argument(
            help="Transaction ids; - reads them from standard input, one a line.", metavar="ID...", show_default=False
        ),
    ],
    *,
    config: ConfigFile = None,
    log_id_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the server's key for hashing ids.  "
            f"[env: {ENV_PREFIX}LOG_ID_KEY_FILE] [default: none, plain SHA-256]",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line, with the id and its hash.")
    ] = False,
) -> None:
    """Print each id as the server's log shows it, one a line, in order.

    The settings must be those of the server, in particular DEDUP_LOG_ID_KEY_FILE and DEDUP_LOG_TRANSACTION_IDS.

    Exit code 0: printed. 2: invalid usage, or an unusable key file.
    """
    flags = {} if log_id_key_file is None else {"log_id_key_file": log_id_key_file}
    settings = load_settings(flags, config)
    logged = LoggedIds(plain=settings.log_transaction_ids == "plain", key=read_log_id_key(settings.log_id_key_file))
    for transaction_id in _read_ids(transaction_ids):
        shown = logged.shown(transaction_id)
        if as_json:
            print_json({"transaction_id": transaction_id, "transaction": shown})
        else:
            typer.echo(shown)


def _read_ids(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        if argument != "-":
            yield text_option("ID", argument)
            continue
        for number, raw in enumerate(sys.stdin.buffer, 1):
            try:
                # Only the line ending is removed: an id may end in spaces.
                line = raw.removesuffix(b"\n").removesuffix(b"\r").decode()
            except UnicodeDecodeError:
                raise typer.BadParameter(f"line {number} is not valid UTF-8", param_hint="ID") from None
            if line:
                yield line
