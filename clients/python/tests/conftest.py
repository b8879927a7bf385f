"""Fixtures: the real service over each store, the fake service, and both clients for each of them."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import HealthCheck, settings

from dedup import Client, aio
from dedup.testing import AsyncFakeClient, FakeClient, FakeService
from tests.support.processes import RedisProcess, ServiceProcess

# Examples may be slow on a busy machine.
settings.register_profile("no_deadline", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no_deadline")


class Threaded:
    """Wraps a blocking client in the interface of the asynchronous one, so that one suite tests both."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def claim(self, *arguments: Any, **options: Any) -> "ThreadedClaim":
        """Return a claim to await or enter."""
        return ThreadedClaim(self._client, arguments, options)

    async def get(self, *arguments: Any, **options: Any) -> Any:
        """Look a transaction up."""
        return await asyncio.to_thread(self._client.get, *arguments, **options)


class ThreadedClaim:
    """Wraps a blocking claim in the interface of the asynchronous one."""

    def __init__(self, client: Client, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.__dict__["_parts"] = (client, arguments, options)

    async def _claim(self) -> "ThreadedClaim":
        client, arguments, options = self._parts
        self.__dict__["_claimed"] = await asyncio.to_thread(client.claim, *arguments, **options)
        return self

    def __await__(self) -> Any:
        return self._claim().__await__()

    async def __aenter__(self) -> Self:
        if "_claimed" not in self.__dict__:
            await self._claim()
        self._claimed.__enter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self._claimed.__exit__, *error)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_claimed"], name)
        if name not in {"complete", "release", "extend"}:
            return value

        async def call(*arguments: Any, **options: Any) -> Any:
            return await asyncio.to_thread(value, *arguments, **options)

        return call

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._claimed, name, value)


class World:
    """A live or fake service that makes clients and lets time pass."""

    def __init__(self, target: str | None, *, threaded: bool) -> None:
        self._target = target
        self._threaded = threaded
        self.fake = FakeService()
        self._open: list[Client | aio.Client] = []

    def client(self, **options: Any) -> Any:
        """Return a new client."""
        client: Client | aio.Client
        if self._threaded:
            client = Client(self._target, **options) if self._target else FakeClient(self.fake, **options)
        else:
            client = aio.Client(self._target, **options) if self._target else AsyncFakeClient(self.fake, **options)
        self._open.append(client)
        return Threaded(client) if isinstance(client, Client) else client

    async def pass_time(self, seconds: float) -> None:
        """Let time pass: sleep for the live service, move the clock of the fake."""
        if self._target:
            await asyncio.sleep(seconds)
        else:
            self.fake.advance(seconds)

    async def close(self) -> None:
        """Close every client."""
        for client in self._open:
            if isinstance(client, Client):
                client.close()
            else:
                await client.close()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A real Redis."""
    server = RedisProcess(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def start_service() -> Iterator[Callable[..., ServiceProcess]]:
    """Starts services and stops them at the end of the session."""
    started: list[ServiceProcess] = []

    def start(*arguments: str) -> ServiceProcess:
        process = ServiceProcess(*arguments)
        started.append(process)
        return process.start()

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="session")
def redis_target(redis_server: RedisProcess, start_service: Callable[..., ServiceProcess]) -> str:
    """Address of the service over Redis."""
    return start_service("--store-url", redis_server.url).target


@pytest.fixture(scope="session")
def sqlite_target(tmp_path_factory: pytest.TempPathFactory, start_service: Callable[..., ServiceProcess]) -> str:
    """Address of the service over the embedded store."""
    path: Path = tmp_path_factory.mktemp("store") / "claims.db"
    return start_service("--store-url", f"sqlite://{path}").target


@pytest.fixture(params=["redis", "sqlite"])
def target(request: pytest.FixtureRequest) -> str:
    """Address of the live service, over each store."""
    address: str = request.getfixturevalue(f"{request.param}_target")
    return address


@pytest.fixture(params=["redis", "sqlite", "fake"])
def live_target(request: pytest.FixtureRequest) -> str | None:
    """Address of the live service over each store, and None for the fake."""
    return None if request.param == "fake" else request.getfixturevalue(f"{request.param}_target")


@pytest.fixture(params=["aio", "sync"])
async def world(request: pytest.FixtureRequest, live_target: str | None) -> AsyncIterator[World]:
    """Every combination of service and client."""
    world = World(live_target, threaded=request.param == "sync")
    yield world
    await world.close()


@pytest.fixture
async def make_world() -> AsyncIterator[Callable[..., World]]:
    """Makes worlds of services that the test starts, and closes them."""
    made: list[World] = []

    def make(target: str | None, *, threaded: bool) -> World:
        made.append(World(target, threaded=threaded))
        return made[-1]

    yield make
    for world in made:
        await world.close()


@pytest.fixture
def unique() -> str:
    """A string that no other test uses in its ids."""
    return uuid.uuid4().hex
