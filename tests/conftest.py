"""Shared fixtures: one real Redis per test worker, and services over both stores."""

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

# A loaded machine slows examples down; that is not a test failure.
settings.register_profile("no-deadline", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no-deadline")


def pytest_configure() -> None:
    """Restore SIGINT handling when a shell started the tests in the background with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run asynchronous tests on uvloop, as the service does."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A real Redis for this test worker; teardown fails if a claim has no expiry."""
    server = RedisProcess(tmp_path_factory.mktemp("redis")).start()
    yield server
    with redis.Redis(port=server.port) as client:
        immortal = [key for key in client.scan_iter("dedup:*", count=1000) if client.pttl(key) == -1]
    server.stop()
    assert not immortal, f"claims without an expiry: {immortal}"


@pytest.fixture
def start_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisProcess]]:
    """Starts Redis servers with the given options and stops them after the test."""
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
    """A plain Redis client, to inspect stored values and to act as another user of the same Redis."""
    with redis.Redis(port=redis_server.port, protocol=2) as client:
        yield client


@pytest.fixture
def unique() -> str:
    """A unique string for the ids of one test."""
    return uuid.uuid4().hex


def store_url(kind: str, redis_server: RedisProcess, folder: Path) -> str:
    """Return the URL of a Redis or SQLite store."""
    return redis_server.url if kind == "redis" else f"sqlite://{folder / 'claims.db'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests marked `every_engine` on each engine, and other tests on the default engine.

    Tests that use `service` run over both stores, or over Redis alone if marked `one_store`.
    """
    marked = metafunc.definition.get_closest_marker
    if "engine" in metafunc.fixturenames:
        engines = get_args(EngineName) if marked("every_engine") else ["grpcio"]
        metafunc.parametrize("engine", engines, indirect=True, scope="session")
    if "service" in metafunc.fixturenames:
        services = ["grpcio-redis"] if marked("one_store") else ["grpcio-redis", "grpcio-sqlite"]
        # The native engine runs over one store only: its behaviour does not depend on the store.
        services += ["native-redis"] if marked("every_engine") else []
        metafunc.parametrize("service", services, indirect=True, scope="session")


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest) -> EngineName:
    """The engine of the services that this test starts."""
    name: EngineName = request.param
    return name


@pytest.fixture(scope="session")
def service(
    request: pytest.FixtureRequest, redis_server: RedisProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """The real service in a separate process, shared by the tests of one test worker."""
    engine, _, store = request.param.partition("-")
    url = store_url(store, redis_server, tmp_path_factory.mktemp("service"))
    # A loaded disk may take seconds to sync.
    arguments = ("--store-url", url, "--store-timeout", "20s", "--log-level", "debug")
    process = ServiceProcess("--engine", engine, *arguments).start()
    yield process
    assert process.stop() == 0
    assert not [line for line in process.stderr_lines if not line.startswith("{")], "stderr has a line that is not JSON"
    assert not [line for line in process.logs if line["level"] == "error"], "the service logged an error"
