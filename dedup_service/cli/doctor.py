"""`dedup-service doctor`: what is wrong with the store, and what to change. It asks the store and no server."""

import asyncio
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dedup_service.claims import StoreRefused, StoreUnavailable
from dedup_service.claims.findings import Finding, Severity, worst
from dedup_service.cli import exit_codes
from dedup_service.cli.options import AsJson
from dedup_service.cli.show import print_json
from dedup_service.config.settings import CONFIG_VARIABLE, ENV_PREFIX, BadSettings, Settings, load_settings
from dedup_service.server.startup_checks import store_place
from dedup_service.stores.registry import examine_store, make_store

_EXITS = {Severity.WARNING: exit_codes.FOUND_WARNING, Severity.CRITICAL: exit_codes.FOUND_CRITICAL}


def _as_serve(name: str, metavar: str = "TEXT") -> typer.models.OptionInfo:
    """Return the option of `serve` for a setting."""
    text = f"{Settings.model_fields[name].description}  [env: {ENV_PREFIX}{name.upper()}]"
    option: typer.models.OptionInfo = typer.Option(help=text, show_default=False, metavar=metavar)
    return option


def doctor(
    *,
    config: Annotated[
        Path | None, typer.Option(help=f"A TOML file of settings.  [env: {CONFIG_VARIABLE}]", show_default=False)
    ] = None,
    store_url: Annotated[str | None, _as_serve("store_url")] = None,
    store_url_file: Annotated[str | None, _as_serve("store_url_file", "FILE")] = None,
    key_prefix: Annotated[str | None, _as_serve("key_prefix")] = None,
    key_layout: Annotated[str | None, _as_serve("key_layout", "prefixed|raw")] = None,
    store_timeout: Annotated[str | None, _as_serve("store_timeout", "DURATION")] = None,
    min_replicas: Annotated[int | None, _as_serve("min_replicas", "INTEGER")] = None,
    as_json: AsJson = False,
) -> None:
    """Examine the store of the settings, which may lose claims or refuse them.

    It asks the store itself and changes nothing in it, but for one scratch key that it removes again.

    Exit code 0: nothing worse than a remark. 7: a warning. 8: something critical. 1: the store cannot be examined. 2:
    bad usage.
    """
    flags = {
        "store_url": store_url,
        "store_url_file": store_url_file,
        "key_prefix": key_prefix,
        "key_layout": key_layout,
        "store_timeout": store_timeout,
        "min_replicas": min_replicas,
    }
    settings = load_settings({name: value for name, value in flags.items() if value is not None}, config)
    place = store_place(settings)
    try:
        store = make_store(place).description
        findings = asyncio.run(examine_store(place))
    except ValueError as error:
        raise BadSettings(f"{ENV_PREFIX}STORE_URL (--store-url): {error}") from None
    except StoreUnavailable as error:
        _fail(store, error.reason, str(error), as_json=as_json)
    except StoreRefused as error:
        _fail(store, "STORE_REFUSED", str(error), as_json=as_json)
    if as_json:
        print_json({"store": store, "findings": [finding.as_dict() for finding in findings]})
    else:
        _print_findings(store, findings)
    raise typer.Exit(_EXITS.get(worst(findings), 0))


def _fail(store: str, reason: str, message: str, *, as_json: bool) -> NoReturn:
    if as_json:
        print_json({"store": store, "error": {"reason": reason, "message": message}})
    else:
        typer.echo(f"{reason}: {message}", err=True)
    raise typer.Exit(exit_codes.ERROR)


def _print_findings(store: str, findings: list[Finding]) -> None:
    typer.echo(store)
    width = max(len(finding.check) for finding in findings)
    # The worst last, which is where the eye is when a terminal scrolls.
    for finding in sorted(findings, key=lambda finding: finding.severity):
        typer.echo(f"  {finding.severity.name:<8}  {finding.check:<{width}}  {finding.message}")
        if finding.remedy:
            typer.echo(f"  {'':<8}  {'':<{width}}  Remedy: {finding.remedy}")
