"""Engine selection and engine-specific errors. The `every_engine` tests cover the equal behaviour of both engines."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.api.endpoint import Admission, Endpoint
from dedup_service.api.servicer import SERVICE_NAME
from dedup_service.config.errors import FatalError
from dedup_service.config.settings import EngineName
from dedup_service.observability.calls import Call, CallLog
from dedup_service.observability.logs import LoggedIds
from dedup_service.server.engines import EngineOptions, make_engine
from tests.support.polling import wait_until
from tests.support.processes import ServiceProcess, run_command

pytestmark = pytest.mark.every_engine


def test_the_log_names_the_engine(
    start_service: Callable[..., ServiceProcess], engine: EngineName, tmp_path: Path
) -> None:
    """The server_started event names the engine."""
    service = start_service("--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    assert service.events("server_started")[0]["engine"] == engine


def test_the_native_engine_is_not_imported_by_default() -> None:
    """The default engine is grpcio, and the native engine's package is not loaded."""
    code = "import sys, dedup_service.cli, dedup_service.server.life_cycle; print('pygrpc_native' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_a_missing_engine_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra to install and the setting to change."""
    monkeypatch.setitem(sys.modules, "pygrpc_native", None)
    monkeypatch.delitem(sys.modules, "dedup_service.server.engines.native", raising=False)
    with pytest.raises(FatalError, match="install the extra `native`, or set DEDUP_ENGINE=grpcio"):
        make_engine("native", lambda _: None, EngineOptions(max_streams=1))


def test_an_unknown_engine_is_an_error() -> None:
    """The error names the setting and its valid values."""
    ended = run_command("serve", environment={"DEDUP_ENGINE": "rust"})
    assert ended.returncode == 2
    assert "DEDUP_ENGINE (--engine): 'rust' is unknown: write grpcio or native" in ended.stderr


def test_the_native_engine_needs_a_temporary_folder(tmp_path: Path) -> None:
    """The native engine forwards some calls to grpcio over a temporary socket; the error says what to set."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    arguments = ("--engine", "native", "--listen", "127.0.0.1:0", "--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    ended = run_command("serve", *arguments, environment={"TMPDIR": str(folder)})
    assert ended.returncode == 1
    assert "set TMPDIR to a writable one with a short path, or set DEDUP_ENGINE=grpcio" in ended.stderr


def test_the_native_engine_removes_its_temporary_socket(tmp_path: Path) -> None:
    """The folder of the temporary socket is empty after the server exits."""
    arguments = ("--engine", "native", "--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    # tmp_path may be too long for the path of a socket.
    with tempfile.TemporaryDirectory() as folder:
        service = ServiceProcess(*arguments, environment={"TMPDIR": folder}).start()
        wait_until(lambda: list(Path(folder).iterdir()), what="the folder of the socket")
        assert service.stop() == 0
        assert list(Path(folder).iterdir()) == []


async def test_a_port_is_shared_only_with_reuse_port(engine: EngineName) -> None:
    """With reuse_port two servers listen on one port; a third without it cannot.

    Protections: grpc.so_reuseport, and the probe that uses the same option.
    """
    sharing = [make_engine(engine, lambda _: None, EngineOptions(max_streams=1, reuse_port=True)) for _ in range(2)]
    address = sharing[0].listen("127.0.0.1:0")
    assert sharing[1].listen(address) == address
    alone = make_engine(engine, lambda _: None, EngineOptions(max_streams=1))
    with pytest.raises(FatalError, match="does another server listen there"):
        alone.listen(address)
    for server in sharing:
        await server.start()
        await server.stop(None)


@pytest.mark.parametrize("timeout_s", [None, 60])
async def test_a_handler_receives_its_callers_deadline(engine: EngineName, timeout_s: float | None) -> None:
    """On each engine the handler receives the remaining time, or None for a call without a deadline.

    Protection: the native engine's value for "no deadline" is read as None.
    """
    budgets: list[float | None] = []

    async def look(
        _: dedup_pb2.GetTransactionRequest, __: Call, budget_s: float | None
    ) -> dedup_pb2.GetTransactionResponse:
        budgets.append(budget_s)
        return dedup_pb2.GetTransactionResponse()

    endpoint = Endpoint(
        method="GetTransaction",
        request_type=dedup_pb2.GetTransactionRequest,
        handler=look,
        observer=CallLog(structlog.wrap_logger(structlog.ReturnLogger()), LoggedIds(plain=False)),
        admission=Admission(1),
    )

    def register(server: grpc.aio.Server) -> None:
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "GetTransaction": grpc.unary_unary_rpc_method_handler(endpoint.serve)
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods),))
        server.add_registered_method_handlers(SERVICE_NAME, methods)

    server = make_engine(engine, register, EngineOptions(max_streams=1))
    address = server.listen("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        await dedup_pb2_grpc.DedupServiceStub(channel).GetTransaction(
            dedup_pb2.GetTransactionRequest(), timeout=timeout_s
        )
    await server.stop(None)
    assert [budget is None for budget in budgets] == [timeout_s is None]
