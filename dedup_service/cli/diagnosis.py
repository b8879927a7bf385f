"""`dedup-service doctor`, `healthcheck` and `hash-id`."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dedup.error_details import failure_of_call
from dedup_service.api.health import FORGOTTEN, LAST_FORGOTTEN
from dedup_service.claims import Finding, Severity, StoreRefused, StoreUnavailable, worst
from dedup_service.cli.connection import Server
from dedup_service.cli.options import (
    AsJson,
    ConfigFile,
    Target,
    Timeout,
    TlsCa,
    TlsCert,
    TlsKey,
    TokenFile,
    milliseconds_option,
    text_option,
)
from dedup_service.cli.output import ExitCode, fail, print_json
from dedup_service.config.files import read_log_id_key
from dedup_service.config.settings import ENV_PREFIX, SETTINGS, BadSettings, health_address, load_settings, variable_of

_EXITS = {Severity.WARNING: ExitCode.FOUND_WARNING, Severity.CRITICAL: ExitCode.FOUND_CRITICAL}


def _setting(name: str, metavar: str = "TEXT") -> typer.models.OptionInfo:
    """Return the option of a setting, with the help of `serve`."""
    text = f"{SETTINGS[name].description}  [env: {variable_of(name)}]"
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
    # Imported late: other commands, such as the health check of a probe, do not need the stores.
    from dedup_service.stores.registry import examine_store, make_store, store_config  # noqa: PLC0415 - as above

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
    # The worst comes last, visible when the terminal scrolls.
    for finding in sorted(findings, key=lambda finding: finding.severity):
        typer.echo(f"  {finding.severity.name:<8}  {finding.check:<{width}}  {finding.message}")
        if finding.remedy:
            typer.echo(f"  {'':<8}  {'':<{width}}  Remedy: {finding.remedy}")


_STORE_DETAILS = "dedup-store-"


def healthcheck(
    *,
    service: Annotated[
        str, typer.Option(help="Service to check: liveness, a gRPC service, or empty for the whole server.")
    ] = "",
    target: Target = None,
    timeout: Timeout = "2s",
    as_json: AsJson = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
) -> None:
    """Check whether a server is serving: exit code 0 if it is, 1 if not.

    Without --target it calls the first address of DEDUP_HEALTH_LISTEN, if that is set. With --service liveness it
    checks the process alone, whatever the state of the store.

    It also reports whether the store has forgotten claims since the server started. The exit code does not change.
    """
    timeout_ms = milliseconds_option("timeout", timeout)
    with Server(target, tls_ca, tls_cert, tls_key, token_file).connect(health_address) as channel:
        try:
            reply, call = health_pb2_grpc.HealthStub(channel).Check.with_call(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_ms / 1000
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                _print_status("SERVICE_UNKNOWN", {}, as_json=as_json)
                raise typer.Exit(ExitCode.ERROR) from None
            fail(failure_of_call(error), as_json=as_json)
    details = {key: value for key, value in call.trailing_metadata() or () if key.startswith(_STORE_DETAILS)}
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    _print_status(status, details, as_json=as_json)
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise typer.Exit(ExitCode.ERROR)


def _print_status(status: str, details: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        shown = {_json_key(key): int(value) if value.isdigit() else value for key, value in details.items()}
        print_json({"status": status, **shown})
        return
    typer.echo(status)
    if times := int(details.get(FORGOTTEN, "0")):
        typer.echo(
            f"  the store has forgotten claims {times} time{'s' * (times > 1)}, last at {details[LAST_FORGOTTEN]}"
        )


def _json_key(key: str) -> str:
    return key.removeprefix("dedup-").replace("-", "_")


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
    # Imported late: other commands do not need the logs.
    from dedup_service.observability.logs import LoggedIds  # noqa: PLC0415 - as above

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
                # Remove only the line ending: an id may end in spaces.
                line = raw.removesuffix(b"\n").removesuffix(b"\r").decode()
            except UnicodeDecodeError:
                raise typer.BadParameter(f"line {number} is not valid UTF-8", param_hint="ID") from None
            if line:
                yield line
