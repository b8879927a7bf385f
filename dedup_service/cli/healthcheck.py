"""`dedup-service healthcheck`, for container probes."""

import json
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dedup_service.cli.channel import fail, open_channel
from dedup_service.cli.options import AsJson, Target, Timeout, milliseconds_option
from dedup_service.config.settings import health_address
from dedup_service.server.health_details import FORGOTTEN, LAST_FORGOTTEN

_DETAILS = "dedup-store-"


def _json_key(key: str) -> str:
    return key.removeprefix("dedup-").replace("-", "_")


def healthcheck(
    *,
    service: Annotated[str, typer.Option(help="The service to ask about; empty means the server as a whole.")] = "",
    target: Target = None,
    timeout: Timeout = "2s",
    as_json: AsJson = False,
) -> None:
    """Ask a server whether it is serving: exit code 0 if so, 1 if not.

    Without --target the first address of DEDUP_HEALTH_LISTEN is asked, if that is set. With --service liveness it says
    whether the process lives, whatever its store does.

    It also says whether the store has forgotten claims since the server began, which changes no exit code.
    """
    timeout_ms = milliseconds_option("timeout", timeout)
    with open_channel(target, health_address) as channel:
        try:
            reply, call = health_pb2_grpc.HealthStub(channel).Check.with_call(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_ms / 1000
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                typer.echo(json.dumps({"status": "SERVICE_UNKNOWN"}) if as_json else "SERVICE_UNKNOWN")
                raise typer.Exit(1) from None
            fail(error, as_json=as_json)
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    details = {key: value for key, value in call.trailing_metadata() or () if key.startswith(_DETAILS)}
    if as_json:
        shown = {_json_key(key): int(value) if value.isdigit() else value for key, value in details.items()}
        typer.echo(json.dumps({"status": status, **shown}))
    else:
        typer.echo(status)
        if int(details.get(FORGOTTEN, "0")):
            typer.echo(f"  its store has forgotten claims {details[FORGOTTEN]} times, last {details[LAST_FORGOTTEN]}")
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise typer.Exit(1)
