"""The commands that people give by hand. `serve` is listed here and read elsewhere: it starts without this module."""

from typing import Annotated

import typer

from dedup_service.cli.access import with_access
from dedup_service.cli.ask import claim, get
from dedup_service.cli.batch import batch
from dedup_service.cli.doctor import doctor
from dedup_service.cli.healthcheck import healthcheck
from dedup_service.cli.hold import complete, extend, release
from dedup_service.cli.serve import run_serve, version_text
from dedup_service.cli.watch import watch

app = typer.Typer(
    name="dedup-service",
    help="Admits each transaction at most once: claim before the work, so that a retry or a double click cannot pay "
    "twice.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer's signature of a callback
    if asked:
        typer.echo(version_text())
        raise typer.Exit


@app.callback()
def version_option(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command("serve", add_help_option=False, context_settings={"ignore_unknown_options": True})
def serve(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Serve claims over gRPC until SIGTERM or SIGINT."""
    run_serve(arguments or [])


for _command in (claim, get, complete, release, extend, watch, batch, healthcheck):
    app.command(_command.__name__)(with_access(_command))
app.command("doctor")(doctor)
