"""Fixtures of the whole suite: one real Redis for each test worker, and services in front of both stores."""

import asyncio
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import get_args

import pytest
import redis
import uvloop
from hypothesis import HealthCheck, settings

from dedup_service.config.settings import EngineName
from tests.support.processes import RedisProcess, ServiceProcess

# A busy machine makes an example slow, which says nothing about what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start, also where a shell began them in the background with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run asynchronous tests on the loop that the service runs on."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A real Redis for this test worker; at the end no claim in it may lack an expiry."""
    server = RedisProcess(tmp_path_factory.mktemp("redis")).start()
    yield server
    with redis.Redis(port=server.port) as client:
        immortal = [key for key in client.scan_iter("dedup:*", count=1000) if client.pttl(key) == -1]
    server.stop()
    assert not immortal, f"claims that would live for ever: {immortal}"


@pytest.fixture
def start_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisProcess]]:
    """Starts Redis servers with options of the test's own, and ends them with it."""
    started: list[RedisProcess] = []

    def start(*options: str, port: int = 0, tls: bool = False) -> RedisProcess:
        server = RedisProcess(tmp_path_factory.mktemp("redis"), *options, tls=tls)
        started.append(server)
        return server.start(port)

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def redis_client(redis_server: RedisProcess) -> Iterator[redis.Redis]:
    """A plain client, to look at what the service wrote and to be the service's neighbour."""
    with redis.Redis(port=redis_server.port, protocol=2) as client:
        yield client


@pytest.fixture
def unique() -> str:
    """Text that no other test uses in its ids."""
    return uuid.uuid4().hex


def store_url(kind: str, redis_server: RedisProcess, folder: Path) -> str:
    """Return the URL of a store of this kind."""
    return redis_server.url if kind == "redis" else f"sqlite://{folder / 'claims.db'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests marked `every_engine` on each engine, the others on the default one.

    Tests with the shared service run over both stores, or over Redis alone where they are marked `one_store`.
    """
    marked = metafunc.definition.get_closest_marker
    if "engine" in metafunc.fixturenames:
        engines = get_args(EngineName) if marked("every_engine") else ["grpcio"]
        metafunc.parametrize("engine", engines, indirect=True, scope="session")
    if "service" in metafunc.fixturenames:
        services = ["grpcio-redis"] if marked("one_store") else ["grpcio-redis", "grpcio-sqlite"]
        # The other engine once: it cannot see which store is behind it.
        services += ["native-redis"] if marked("every_engine") else []
        metafunc.parametrize("service", services, indirect=True, scope="session")


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> EngineName:
    """The engine of the services and servers this test starts."""
    name: EngineName = request.param
    return name


@pytest.fixture(scope="session")
def service(
    request: pytest.FixtureRequest, redis_server: RedisProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """The real service in a second process, shared by the tests of a worker."""
    engine, _, store = request.param.partition("-")
    url = store_url(store, redis_server, tmp_path_factory.mktemp("service"))
    process = ServiceProcess("--engine", engine, "--store-url", url, "--log-level", "debug").start()
    yield process
    assert process.stop() == 0
    assert not [line for line in process.stderr_lines if not line.startswith("{")], "a line that is not JSON"
    assert not [line for line in process.logs if line["level"] == "error"], "an error in the log"
