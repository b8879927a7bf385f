"""`dedup-service doctor`: examines the store itself, without a server."""

import asyncio
from typing import Annotated, NoReturn

import typer

from dedup_service.claims import Finding, Severity, StoreRefused, StoreUnavailable, worst
from dedup_service.cli.options import AsJson, ConfigFile
from dedup_service.cli.output import ExitCode, print_json
from dedup_service.config.settings import ENV_PREFIX, BadSettings, Settings, load_settings
from dedup_service.stores.registry import examine_store, make_store, store_config

_EXITS = {Severity.WARNING: ExitCode.FOUND_WARNING, Severity.CRITICAL: ExitCode.FOUND_CRITICAL}


def _setting(name: str, metavar: str = "TEXT") -> typer.models.OptionInfo:
    """Return the option of a setting, with the help of `serve`."""
    text = f"{Settings.model_fields[name].description}  [env: {ENV_PREFIX}{name.upper()}]"
    option: typer.models.OptionInfo = typer.Option(help=text, show_default=False, metavar=metavar)
    return option


def doctor(
    *,
    config: ConfigFile = None,
    store_url: Annotated[str | None, _setting("store_url")] = None,
    store_url_file: Annotated[str | None, _setting("store_url_file", "FILE")] = None,
    key_prefix: Annotated[str | None, _setting("key_prefix")] = None,
    key_layout: Annotated[str | None, _setting("key_layout", "prefixed|raw")] = None,
    store_timeout: Annotated[str | None, _setting("store_timeout", "DURATION")] = None,
    min_replicas: Annotated[int | None, _setting("min_replicas", "INTEGER")] = None,
    as_json: AsJson = False,
) -> None:
    """Report what makes the configured store lose or refuse claims.

    It calls the store itself and changes nothing, apart from one scratch key that it deletes again.

    Exit code 0: no warning. 7: a warning. 8: a critical finding. 1: the store cannot be examined. 2: invalid usage.
    """
    flags = {
        "store_url": store_url,
        "store_url_file": store_url_file,
        "key_prefix": key_prefix,
        "key_layout": key_layout,
        "store_timeout": store_timeout,
        "min_replicas": min_replicas,
    }
    store = store_config(load_settings({name: value for name, value in flags.items() if value is not None}, config))
    try:
        description = make_store(store).description
        findings = asyncio.run(examine_store(store))
    except ValueError as error:
        raise BadSettings(f"{ENV_PREFIX}STORE_URL (--store-url): {error}") from None
    except (StoreUnavailable, StoreRefused) as error:
        _fail(description, error.reason, str(error), as_json=as_json)
    if as_json:
        print_json({"store": description, "findings": [finding.as_dict() for finding in findings]})
    else:
        _print_findings(description, findings)
    raise typer.Exit(_EXITS.get(worst(findings), 0))


def _fail(description: str, reason: str, message: str, *, as_json: bool) -> NoReturn:
    if as_json:
        print_json({"store": description, "error": {"reason": reason, "message": message}})
    else:
        typer.echo(f"{reason}: {message}", err=True)
    raise typer.Exit(ExitCode.ERROR)


def _print_findings(description: str, findings: list[Finding]) -> None:
    typer.echo(description)
    width = max(len(finding.check) for finding in findings)
    # The worst comes last: it stays visible when the terminal scrolls.
    for finding in sorted(findings, key=lambda finding: finding.severity):
        typer.echo(f"  {finding.severity.name:<8}  {finding.check:<{width}}  {finding.message}")
        if finding.remedy:
            typer.echo(f"  {'':<8}  {'':<{width}}  Remedy: {finding.remedy}")
