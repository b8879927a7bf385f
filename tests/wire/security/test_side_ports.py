"""Hostile peers of the health and metrics listeners: probes, scrapes and claims still succeed."""

import resource
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from unittest.mock import Mock

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.api.health import HealthServicer, StoreHistory
from dedup_service.config.settings import load_settings
from dedup_service.server import health
from dedup_service.server.descriptors import allow_descriptors
from dedup_service.server.engines import MAX_CONNECTIONS
from dedup_service.server.health import MAX_PROBE_CONNECTIONS
from tests.support.hostile_peer import PREFACE, HostilePeer
from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess
from tests.support.scrapes import Scrape

Start = Callable[..., ServiceProcess]
SERVING = health_pb2.HealthCheckResponse.SERVING

# Connections that send nothing, half a preface, or a preface and no call.
IDLE = (b"", PREFACE[:10], PREFACE + bytes.fromhex("000000040000000000"))
# Requests without an end.
UNFINISHED = (b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nHost: x\r\n", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n")


@pytest.fixture
def peers() -> Iterator[Callable[[str, int, tuple[bytes, ...]], list[HostilePeer]]]:
    """Opens connections that each send one of the greetings in turn, and keeps them open until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as stack:

        def connect(target: str, count: int, greetings: tuple[bytes, ...]) -> list[HostilePeer]:
            opened = [stack.enter_context(HostilePeer(target)) for _ in range(count)]
            for number, peer in enumerate(opened):
                peer.send(greetings[number % len(greetings)])
            return opened

        yield connect
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


Peers = Callable[[str, int, tuple[bytes, ...]], list[HostilePeer]]


def health_target(service: ServiceProcess) -> str:
    """Return the address of the health listener."""
    address: str = service.events("health_listener_started")[0]["addresses"][0]
    return address


def metrics_target(service: ServiceProcess) -> str:
    """Return the address of the metrics listener."""
    address: str = service.events("metrics_listener_started")[0]["address"]
    return address


def is_live(target: str) -> bool:
    """Return whether a liveness probe over a new connection succeeds."""
    with grpc.insecure_channel(target) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service="liveness")
            return bool(health_pb2_grpc.HealthStub(channel).Check(request, timeout=20).status == SERVING)
        except grpc.RpcError:
            return False


def claim_succeeds(service: ServiceProcess, transaction_id: str) -> bool:
    """Return whether a claim over a new connection receives CLAIMED."""
    with service.channel() as channel:
        request = dedup_pb2.ClaimTransactionRequest(transaction_id=transaction_id)
        reply = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(request, timeout=20)
    return reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED


def is_closed(peer: HostilePeer) -> bool:
    """Return whether the server has closed the connection; discards what it sent."""
    peer.socket.setblocking(False)
    try:
        while peer.socket.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@pytest.mark.every_engine
def test_a_probe_succeeds_while_peers_hold_idle_connections(start_service: Start, tmp_path: Path, peers: Peers) -> None:
    """With 300 idle connections to the health listener a liveness probe is answered at once.

    Protection: the connection limit of the health listener is far above this.
    """
    service = start_service("--health-listen", "127.0.0.1:0", "--store-url", f"sqlite://{tmp_path / 'c.db'}")
    peers(health_target(service), 300, IDLE)
    assert is_live(health_target(service))


def test_the_health_listener_closes_idle_connections(
    start_grpcio: Start, tmp_path: Path, peers: Peers, unique: str
) -> None:
    """More idle connections than the limit delay a probe until the server closes them; claims do not notice.

    Protection: the limit on idle time, shorter than the limit on age.
    """
    service = start_grpcio("--health-listen", "127.0.0.1:0", "--store-url", f"sqlite://{tmp_path / 'c.db'}")
    opened = peers(health_target(service), 600, IDLE)
    assert claim_succeeds(service, unique)
    wait_until(lambda: is_live(health_target(service)), deadline_s=45, what="a probe")
    wait_until(lambda: all(map(is_closed, opened)), deadline_s=45, what="the end of the idle connections")


async def test_the_health_listener_ends_calls_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Watch, whose connection is never idle, ends at the limit of its connection's age.

    Protection: that limit.
    """
    options = [(name, min(value, 500) if "_age" in name else value) for name, value in health._LISTENER_OPTIONS]
    monkeypatch.setattr(health, "_LISTENER_OPTIONS", tuple(options))
    servicer, log = HealthServicer(StoreHistory()), Mock()
    server = await health.listen_for_probes(["127.0.0.1:0"], servicer, log, reuse_port=False)
    async with grpc.aio.insecure_channel(log.info.call_args.kwargs["addresses"][0]) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for _ in watch:
                pass
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.stop(None)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_unfinished_scrapes_take_no_descriptors(
    start_grpcio: Start, redis_server: RedisProcess, peers: Peers, unique: str, workers: str
) -> None:
    """During 1,100 unfinished requests to the metrics port, scrapes and claims succeed.

    Protection: beyond its limit the endpoint closes the oldest connection, and no connection has a thread.
    """
    service = start_grpcio(*("--metrics-listen", "127.0.0.1:0", "--workers", workers, "--store-url", redis_server.url))
    before = usage(service)
    opened = peers(metrics_target(service), 1_100, UNFINISHED)
    assert Scrape(service).total("dedup_build_info") == 1
    assert claim_succeeds(service, unique)
    threads, descriptors = (now - then for now, then in zip(usage(service), before, strict=True))
    assert threads <= 5
    assert descriptors < 150
    assert is_closed(opened[0])


def usage(service: ServiceProcess) -> tuple[int, int]:
    """Return the numbers of threads and descriptors of the main process; zeros if the platform does not report them."""
    if sys.platform != "linux":
        return 0, 0
    process = Path(f"/proc/{service.pid}")
    threads = int((process / "status").read_text().split("Threads:")[1].split()[0])
    return threads, sum(1 for _ in (process / "fd").iterdir())


def test_an_unfinished_scrape_ends(start_grpcio: Start, tmp_path: Path, peers: Peers) -> None:
    """The endpoint closes a connection whose request does not end, or whose peer does not read.

    Protection: the time limit of a request.
    """
    service = start_grpcio("--metrics-listen", "127.0.0.1:0", "--store-url", f"sqlite://{tmp_path / 'c.db'}")
    opened = peers(metrics_target(service), 8, UNFINISHED)
    wait_until(lambda: all(map(is_closed, opened)), deadline_s=60, what="the end of the unfinished requests")


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
        (b"GET /metrics HTTP/1.0\r\n\r\n", b"200"),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"200"),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"405"),
        (b"GET\r\n\r\n", b"400"),
        (b"\xff\xfe\x00 / HTTP/1.1\r\n\r\n", b"405"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", b""),
    ],
)
def test_every_request_to_the_metrics_port_ends_its_connection(
    measured: ServiceProcess, request_head: bytes, status: bytes
) -> None:
    """The endpoint answers one request of a connection, or none that is too long, and closes the connection."""
    host, _, port = metrics_target(measured).rpartition(":")
    with socket.create_connection((host, int(port)), 30) as peer:
        peer.sendall(request_head)
        answer = b""
        try:
            while chunk := peer.recv(65_536):
                answer += chunk
        except ConnectionResetError:
            assert not status
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.partition(b" ")[2][:3] == status
    assert (b"dedup_build_info" in body) == (status == b"200" and request_head.startswith(b"GET"))


def test_a_scraper_chooses_the_format(measured: ServiceProcess) -> None:
    """A scraper that accepts OpenMetrics receives it, and others the text format."""
    plain, _ = scraped(measured, "*/*")
    assert plain.startswith("text/plain")
    openmetrics, page = scraped(measured, "application/openmetrics-text; version=1.0.0")
    assert openmetrics.startswith("application/openmetrics-text")
    assert page.endswith(b"# EOF\n")


def scraped(service: ServiceProcess, accept: str) -> tuple[str, bytes]:
    """Return the content type and the body of a scrape."""
    with closing(HTTPConnection(metrics_target(service), timeout=30)) as connection:
        connection.request("GET", "/metrics", headers={"Accept": accept})
        page = connection.getresponse()
        return page.headers["Content-Type"], page.read()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service with metrics, which must exit with 0."""
    url = f"sqlite://{tmp_path_factory.mktemp('measured') / 'claims.db'}"
    process = ServiceProcess("--metrics-listen", "127.0.0.1:0", "--store-url", url).start()
    yield process
    assert process.stop() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows the limits of another process")
def test_the_process_may_open_as_many_files_as_its_peers_connections(start_grpcio: Start, tmp_path: Path) -> None:
    """A service started with a soft limit of 256 open files raises it to the sum of its connection limits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        service = start_grpcio("--health-listen", "127.0.0.1:0", "--store-url", f"sqlite://{tmp_path / 'c.db'}")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    needed = MAX_CONNECTIONS + MAX_PROBE_CONNECTIONS
    allowed, _ = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    assert allowed > needed or service.events("descriptors_limited")[0]["limit"] == allowed == hard


def test_a_hard_limit_that_is_too_low_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard limit of open files below the sum of the connection limits is logged; the soft limit is raised to it."""
    limits = [(256, 1_024)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    log = Mock()
    allow_descriptors(load_settings(), log)
    assert limits[-1] == (1_024, 1_024)
    assert log.warning.call_args.args == ("descriptors_limited",)
    assert log.warning.call_args.kwargs["limit"] == 1_024
    limits.append((4_096, 4_096))
    allow_descriptors(load_settings(), log)
    assert (limits[-1], log.warning.call_count) == ((4_096, 4_096), 1)
