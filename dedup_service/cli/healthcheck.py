"""`dedup-service healthcheck`, for container probes."""

from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dedup.error_details import failure_of_call
from dedup_service.api.health import FORGOTTEN, LAST_FORGOTTEN
from dedup_service.cli.connection import Server
from dedup_service.cli.options import AsJson, Target, Timeout, TlsCa, TlsCert, TlsKey, TokenFile, milliseconds_option
from dedup_service.cli.output import ExitCode, fail, print_json
from dedup_service.config.settings import health_address

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
