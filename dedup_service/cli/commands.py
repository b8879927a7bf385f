"""The typer application. A server starts without it and its libraries."""

from typing import Annotated

import typer

from dedup_service import __version__
from dedup_service.cli.batch import batch
from dedup_service.cli.conformance import conformance
from dedup_service.cli.diagnosis import doctor, hash_id, healthcheck
from dedup_service.cli.transactions import claim, complete, extend, get, release
from dedup_service.cli.watch import watch

app = typer.Typer(
    name="dedup-service",
    help="Admits each transaction at most once: claim it before the work, so that a retry or a double click cannot pay "
    "twice.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:  # noqa: FBT001 - The signature of a typer callback.
    if asked:
        typer.echo(f"dedup-service {__version__}")
        raise typer.Exit


@app.callback()
def _options_before_the_command(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command("serve", add_help_option=False, context_settings={"ignore_unknown_options": True})
def serve(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Serve claims over gRPC until SIGTERM or SIGINT."""
    # Listed for the help; `dedup-service serve` starts without this module.
    from dedup_service.cli.serve import run_serve  # noqa: PLC0415 - other commands need neither it nor its libraries

    run_serve(arguments or [])


for _command in (claim, get, complete, release, extend, watch, batch, healthcheck, doctor, hash_id, conformance):
    app.command()(_command)
