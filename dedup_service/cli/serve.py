"""`dedup-service serve`, with one flag for each setting, made from the settings themselves."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from pydantic.fields import FieldInfo

from dedup_service import __version__
from dedup_service.durations import format_duration
from dedup_service.server import StartRefused, serve
from dedup_service.settings import CONFIG_VARIABLE, ENV_PREFIX, DurationMs, Settings, load_settings
from dedup_service.telemetry.logs import configure_logs


def serve_command() -> Callable[..., None]:
    """Return the function behind `serve`, whose signature has one option for each setting."""

    def serve_(config: Path | None, *, banner: bool, **flags: Any) -> None:  # noqa: ANN401 - as many as settings
        """Serve claims over gRPC until SIGTERM or SIGINT.

        Each setting is a flag, an environment variable and a key of the TOML settings file; the flag wins over the
        variable, and the variable over the file. Durations are written 250ms, 60s, 2h or 7d.
        """
        settings = load_settings({name: value for name, value in flags.items() if value is not None}, config)
        configure_logs(settings.log_level)
        try:
            uvloop.run(serve(settings, _print_banner if banner else _say_nothing))
        except StartRefused as refusal:
            typer.echo(f"dedup-service: {refusal}", err=True)
            raise typer.Exit(1) from None

    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option(help=f"A TOML file of settings.  [env: {CONFIG_VARIABLE}]", show_default=False),
            ],
        ),
        inspect.Parameter(
            "banner",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[
                bool, typer.Option("--banner", help="Print on standard output what to call, once calls are accepted.")
            ],
        ),
        *(_option(name, field) for name, field in Settings.model_fields.items()),
    ]
    serve_.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    serve_.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return serve_


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer's signature of a callback
    if asked:
        typer.echo(f"dedup-service {__version__}")
        raise typer.Exit


def version_option(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    shown = _shown_default(field)
    text = f"{field.description}  [env: {ENV_PREFIX}{name.upper()}]" + (f" [default: {shown}]" if shown else "")
    flag = f"--{name.replace('_', '-')}"
    if field.annotation is bool:
        annotation: Any = Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)]
    else:
        option = typer.Option(flag, help=text, show_default=False, metavar=_metavar(field))
        annotation = Annotated[str | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _is_duration(field: FieldInfo) -> bool:
    return any(item in DurationMs.__metadata__ for item in field.metadata)  # type: ignore[attr-defined]


def _shown_default(field: FieldInfo) -> str:
    if field.default is None:
        return ""
    if _is_duration(field):
        return format_duration(field.default)
    if isinstance(field.default, tuple):
        return ",".join(field.default)
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def _metavar(field: FieldInfo) -> str:
    if choices := getattr(field.annotation, "__args__", None):
        words = [choice for choice in choices if isinstance(choice, str)]
        if words:
            return "|".join(words)
        if Path in choices:
            return "FILE"
    if _is_duration(field):
        return "DURATION"
    return "INTEGER" if field.annotation is int else "TEXT"


def _say_nothing(_: Sequence[str]) -> None:
    pass


def _print_banner(addresses: Sequence[str]) -> None:
    first = addresses[0]
    # grpcurl takes a Unix socket by its path and a flag.
    where = f"-unix {first.removeprefix('unix://')}" if first.startswith("unix:") else first
    typer.echo(
        f"""
dedup-service {__version__} is serving on {", ".join(addresses)}. Claim a transaction, then claim it again:

  .venv/bin/dedup-service claim order-1234 --target {first}
  grpcurl -plaintext -d '{{"transaction_id": "order-1234"}}' {where} dedup.v1.DedupService/ClaimTransaction

Stop it with Ctrl-C. Its log follows.
"""
    )
