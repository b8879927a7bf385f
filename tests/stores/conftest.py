"""Opened stores of every kind."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dedup_service.claims import ClaimStore
from dedup_service.stores.redis.canary import RedisCanary
from dedup_service.stores.redis.link import OneServer
from dedup_service.stores.redis.store import RedisStore
from dedup_service.stores.registry import StoreConfig, make_store
from dedup_service.stores.stored_value import prefixed_layout
from tests.support.cluster import ClusterDeployment
from tests.support.fakeredis_link import FakeredisLink
from tests.support.processes import RedisProcess
from tests.support.sentinel import SentinelProcess, sentinel_url


@pytest.fixture(scope="session")
def sentinel(redis_server: RedisProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelProcess]:
    """A Sentinel that monitors the Redis of this test worker."""
    process = SentinelProcess(tmp_path_factory.mktemp("sentinel") / "one", redis_server.port)
    yield process.start()
    process.stop()


@pytest.fixture(scope="session")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterDeployment]:
    """A cluster of three masters without replicas; tests restore what they change."""
    deployment = ClusterDeployment(tmp_path_factory.mktemp("cluster"), replicas=False)
    try:
        yield deployment.start()
    finally:
        deployment.stop()


@pytest.fixture(params=["redis", "redis-unix-socket", "redis-by-sentinel", "redis-cluster", "fakeredis", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ClaimStore]:
    """An opened store of each kind, in the prefixed layout."""
    opened: ClaimStore
    if request.param == "fakeredis":
        opened = RedisStore(
            OneServer(FakeredisLink()), prefixed_layout("dedup:"), "fakeredis", canary=RedisCanary(b"canary:")
        )
    else:
        if request.param == "sqlite":
            url = f"sqlite://{tmp_path / 'claims.db'}"
        elif request.param == "redis-by-sentinel":
            url = sentinel_url(request.getfixturevalue("sentinel").port, rest="/mymaster/2")
        elif request.param == "redis-cluster":
            url = request.getfixturevalue("masters").url
        else:
            server: RedisProcess = request.getfixturevalue("redis_server")
            url = server.url if request.param == "redis" else f"unix://{server.socket_path}?db=1"
        opened = make_store(StoreConfig(url, timeout_ms=5_000))
    await opened.open()
    yield opened
    await opened.close()
