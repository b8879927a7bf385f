"""The command `dedup-service`: the server, and what people ask of one by hand."""

import sys

import typer

from dedup_service.cli.ask import claim, get
from dedup_service.cli.batch import batch
from dedup_service.cli.doctor import doctor
from dedup_service.cli.healthcheck import healthcheck
from dedup_service.cli.hold import complete, extend, release
from dedup_service.cli.serve import serve_command, version_option
from dedup_service.cli.watch import watch
from dedup_service.settings import BadSettings

app = typer.Typer(
    name="dedup-service",
    help="Admits each transaction at most once: claim before the work, so that a retry or a double click cannot pay "
    "twice.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.callback()(version_option)
app.command("serve")(serve_command())
app.command("claim")(claim)
app.command("get")(get)
app.command("complete")(complete)
app.command("release")(release)
app.command("extend")(extend)
app.command("watch")(watch)
app.command("batch")(batch)
app.command("healthcheck")(healthcheck)
app.command("doctor")(doctor)


def main() -> None:
    """Run the command line; the exit code is 2 for a bad command or setting, as everywhere."""
    try:
        app()
    except BadSettings as error:
        typer.echo(f"dedup-service: {error}", err=True)
        sys.exit(2)
