"""The stores of the runs, and the faults each can have.

A failover is recorded as a call: a master that is deposed may lose, or still show, what no replica acknowledged.
"""

import asyncio
import contextlib
import random
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import redis

from tests.stress.chaos.history import Call
from tests.stress.chaos.proxy import PROXY_FAULTS, LossyProxy
from tests.support.cluster import ClusterDeployment
from tests.support.polling import POLL_S, wait_until
from tests.support.processes import RedisProcess
from tests.support.sentinel import MASTER, SentinelDeployment

# Injects a fault of about so many seconds, and returns when it is over.
Fault = Callable[[float], Awaitable[None]]

_SETTLE_S = 90.0


class Deployment:
    """A store whose processes and files are in `folder`."""

    faults: Mapping[str, Fault]
    arguments: Sequence[str]
    """For the servers; known once started."""
    round_s = 15
    """About how long it takes to inject each fault once."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._folder = folder
        self._rng = rng
        self.failovers: list[Call] = []

    async def start(self) -> None:
        """Start the store."""

    async def stop(self) -> None:
        """End every process, also after a start that failed."""

    async def settle(self) -> None:
        """Return when the store has recovered, and record a failover since the last time."""


class OneRedis(Deployment):
    """A Redis that syncs every write to its file, behind a proxy that drops and delays traffic."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        super().__init__(folder, rng)
        self._redis = RedisProcess(folder, "--appendonly", "yes", "--appendfsync", "always")
        self._proxy = LossyProxy(self._redis.socket_path, rng)
        self.faults = {
            "pause-redis": self._pause,
            "kill-redis": self._restart,
            **{kind: partial(self._disturb, kind) for kind in PROXY_FAULTS},
        }

    async def start(self) -> None:
        """Implement Deployment."""
        await asyncio.to_thread(self._redis.start)
        await self._proxy.__aenter__()
        self.arguments = ("--store-url", self._proxy.url)

    async def stop(self) -> None:
        """Implement Deployment."""
        if self._proxy.is_open:
            await self._proxy.__aexit__()
        self._redis.stop()

    async def _pause(self, seconds: float) -> None:
        self._redis.pause()
        await asyncio.sleep(seconds)
        self._redis.resume()

    async def _restart(self, seconds: float) -> None:
        self._redis.stop()
        await asyncio.sleep(seconds / 3)
        await asyncio.to_thread(self._redis.start)

    async def _disturb(self, kind: str, seconds: float) -> None:
        before = self._proxy.struck[kind]
        self._proxy.fault = kind
        await asyncio.sleep(seconds)
        # Servers may have been reconnecting, or the machine may have stalled, so that no traffic met the fault yet.
        while self._proxy.struck[kind] == before:  # noqa: ASYNC110 - a plain counter, no event
            await asyncio.sleep(POLL_S)
        self._proxy.fault = ""


class Sqlite(Deployment):
    """One file, which all servers share."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        super().__init__(folder, rng)
        self._path = folder / "claims.db"
        self.arguments = ("--store-url", f"sqlite://{self._path}")
        self.faults = {"lock-file": lambda seconds: asyncio.to_thread(self._lock, seconds)}

    def _lock(self, seconds: float) -> None:
        """Hold the write lock, as a backup or another tool does."""
        with contextlib.closing(sqlite3.connect(self._path, timeout=_SETTLE_S, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            time.sleep(seconds)
            connection.execute("ROLLBACK")


class Replicated(Deployment, ABC):
    """Masters with a replica each. Every write waits for its replica: without that a failover may lose any claim."""

    round_s = 30

    def __init__(self, folder: Path, rng: random.Random, servers: SentinelDeployment | ClusterDeployment) -> None:
        super().__init__(folder, rng)
        self._servers = servers
        self._epoch = 0
        self._settled_ns = 0
        self.faults = {
            "kill-master": lambda _: asyncio.to_thread(self._kill),
            "pause-master": lambda _: asyncio.to_thread(self._pause),
            "kill-master-ahead-of-replica": lambda seconds: asyncio.to_thread(self._kill, seconds),
        }

    async def start(self) -> None:
        """Implement Deployment."""
        await asyncio.to_thread(self._servers.start)
        self.arguments = ("--store-url", self._servers.url, "--min-replicas", "1")

    async def stop(self) -> None:
        """Implement Deployment."""
        self._servers.stop()

    async def settle(self) -> None:
        """Implement Deployment. Also notices a failover that no fault asked for, on a machine that stalls."""
        await asyncio.to_thread(wait_until, self._has_settled, _SETTLE_S, "every replica to follow its master")
        epoch, now_ns = await asyncio.to_thread(self._failover_epoch), time.monotonic_ns()
        if self._settled_ns and epoch != self._epoch:
            self.failovers.append(
                Call("nemesis", "failover", "", "", self._settled_ns, now_ns, "ERROR", name=f"to epoch {epoch}")
            )
        self._epoch, self._settled_ns = epoch, now_ns

    def _kill(self, ahead_s: float = 0) -> None:
        """Kill a master; before that, cut its replica off for some time."""
        master, replica = self._rng.choice(self._pairs())
        with redis.Redis(port=replica.port, protocol=2) as client:
            if ahead_s:
                # The master asks for no password, and refuses a replica that sends one.
                client.config_set("masterauth", "wrong")
                client.client_kill_filter(_type="master")
                time.sleep(ahead_s)
            master.stop()
            client.config_set("masterauth", "")
        wait_until(lambda: _role(replica) == "master", _SETTLE_S, "the failover")
        master.start(master.port)

    def _pause(self) -> None:
        master, replica = self._rng.choice(self._pairs())
        master.pause()
        wait_until(lambda: _role(replica) == "master", _SETTLE_S, "the failover")
        master.resume()

    @abstractmethod
    def _servers_in_pairs(self) -> list[tuple[RedisProcess, RedisProcess]]:
        """Return the two servers of each master, in any order."""

    def _pairs(self) -> list[tuple[RedisProcess, RedisProcess]]:
        """Return each master with its replica."""
        return [(one, other) if _role(one) == "master" else (other, one) for one, other in self._servers_in_pairs()]

    def _has_settled(self) -> bool:
        """Whether every replica follows its master, and no server asks a deposed one."""
        return all(_role(master) == "master" and _follows(replica, master) for master, replica in self._pairs())

    @abstractmethod
    def _failover_epoch(self) -> int:
        """Return a number that every failover changes."""


class Sentinel(Replicated):
    """A master, its replica and three Sentinels."""

    _servers: SentinelDeployment

    def __init__(self, folder: Path, rng: random.Random) -> None:
        super().__init__(folder, rng, SentinelDeployment(folder))

    def _servers_in_pairs(self) -> list[tuple[RedisProcess, RedisProcess]]:
        return [(self._servers.master, self._servers.replica)]

    def _has_settled(self) -> bool:
        ((master, replica),) = self._pairs()
        named = {int(self._state(sentinel)["port"]) for sentinel in self._servers.sentinels}
        # A replica answers looks, so a server that still asks the deposed master is in the past.
        return super()._has_settled() and named == {master.port} and not _has_callers(replica)

    def _failover_epoch(self) -> int:
        return int(self._state(self._servers.sentinels[0])["config-epoch"])

    def _state(self, sentinel: RedisProcess) -> Mapping[str, Any]:
        with redis.Redis(port=sentinel.port, protocol=2, decode_responses=True) as client:
            state: Mapping[str, Any] = client.sentinel_master(MASTER)
        return state


class Cluster(Replicated):
    """Three masters with a replica each."""

    _servers: ClusterDeployment

    def __init__(self, folder: Path, rng: random.Random) -> None:
        super().__init__(folder, rng, ClusterDeployment(folder))

    def _servers_in_pairs(self) -> list[tuple[RedisProcess, RedisProcess]]:
        return list(zip(self._servers.masters, self._servers.replicas, strict=True))

    def _has_settled(self) -> bool:
        in_order = all("cluster_state:ok" in info and "cluster_slots_ok:16384" in info for info in self._infos())
        return in_order and super()._has_settled()

    def _failover_epoch(self) -> int:
        return max(int(info.partition("cluster_current_epoch:")[2].split()[0]) for info in self._infos())

    def _infos(self) -> list[str]:
        return [str(node.ask("CLUSTER", "INFO")) for node in (*self._servers.masters, *self._servers.replicas)]


DEPLOYMENTS: dict[str, type[Deployment]] = {
    "redis": OneRedis,
    "sqlite": Sqlite,
    "sentinel": Sentinel,
    "cluster": Cluster,
}


def _role(server: RedisProcess) -> str:
    return str(_replication(server).get("role"))


def _follows(replica: RedisProcess, master: RedisProcess) -> bool:
    state = _replication(replica)
    following = (state.get("role"), state.get("master_port"), state.get("master_link_status"))
    return following == ("slave", master.port, "up")


def _replication(server: RedisProcess) -> Mapping[str, object]:
    try:
        with redis.Redis(port=server.port, protocol=2, socket_timeout=5) as client:
            state: Mapping[str, object] = client.info("replication")
    except redis.RedisError:
        # It is starting, hanging or gone.
        return {}
    return state


def _has_callers(server: RedisProcess) -> bool:
    """Return whether anything but Sentinels, the master and this function is connected."""
    with redis.Redis(port=server.port, protocol=2) as client:
        own = client.client_id()
        return any(
            not other["name"].startswith("sentinel-") and other["flags"] != "M" and int(other["id"]) != own
            for other in client.client_list()
        )
