"""Real Redis Sentinels: a single one, or three that monitor a master and its replica."""

from pathlib import Path
from typing import Self, TypeVar

import redis

from tests.support.polling import wait_until
from tests.support.processes import RedisProcess

MASTER = "mymaster"

_Process = TypeVar("_Process", bound=RedisProcess)


class SentinelProcess(RedisProcess):
    """A real Sentinel that monitors one master; `lines` are added to its configuration."""

    def __init__(self, folder: Path, master_port: int, *lines: str, quorum: int = 1, tls: bool = False) -> None:
        folder.mkdir()
        super().__init__(folder, tls=tls)
        self._master_port = master_port
        self._quorum = quorum
        self._lines = lines

    def _options(self) -> list[str]:
        # Written at each start, since a Sentinel rewrites its configuration.
        file = self._folder / "sentinel.conf"
        lines = [
            f"port {self.port}",
            f"tls-port {self.tls_port}",
            "bind 127.0.0.1",
            f"dir {self._folder}",
            f"logfile {self._log}",
            "sentinel resolve-hostnames no",
            f"sentinel monitor {MASTER} 127.0.0.1 {self._master_port} {self._quorum}",
            f"sentinel down-after-milliseconds {MASTER} 300",
            f"sentinel failover-timeout {MASTER} 2000",
            *self._lines,
        ]
        file.write_text("\n".join(lines) + "\n")
        return [str(file), "--sentinel"]

    def watch(self, master_port: int) -> None:
        """Name another server as the master, as after a failover."""
        with redis.Redis(port=self.port, protocol=2) as admin:
            admin.execute_command("SENTINEL", "REMOVE", MASTER)
            admin.execute_command("SENTINEL", "MONITOR", MASTER, "127.0.0.1", str(master_port), "1")


class SentinelDeployment:
    """A master, its replica and three Sentinels with a quorum of two."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[RedisProcess] = []

    def start(self) -> Self:
        """Start all servers, and return when the Sentinels know each other and the replica follows."""
        self.master = self._start(self._server("master"))
        self.replica = self._start(self._server("replica", "--replicaof", "127.0.0.1", str(self.master.port)))
        with redis.Redis(port=self.replica.port, protocol=2) as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up", what="the replica to follow")
        self.sentinels = [
            self._start(SentinelProcess(self._folder / f"sentinel-{number}", self.master.port, quorum=2))
            for number in range(3)
        ]
        wait_until(lambda: all(self._is_ready(sentinel) for sentinel in self.sentinels), what="the Sentinels to meet")
        return self

    def stop(self) -> None:
        """Stop all servers."""
        for process in reversed(self._started):
            process.stop()

    @property
    def url(self) -> str:
        """The store URL of the master, with all three Sentinels."""
        return sentinel_url(*(sentinel.port for sentinel in self.sentinels))

    def fail_over(self) -> None:
        """Start a failover to the replica."""
        with redis.Redis(port=self.sentinels[0].port, protocol=2) as client:
            client.execute_command("SENTINEL", "FAILOVER", MASTER)

    def forget_master(self) -> None:
        """Make every Sentinel forget the master, so that there is none."""
        for sentinel in self.sentinels:
            with redis.Redis(port=sentinel.port, protocol=2) as client:
                client.execute_command("SENTINEL", "REMOVE", MASTER)

    def promote_by_hand(self) -> None:
        """Make the replica the master, and tell the Sentinels that forgot theirs."""
        with redis.Redis(port=self.replica.port, protocol=2) as client:
            client.execute_command("REPLICAOF", "NO", "ONE")
        for sentinel in self.sentinels:
            with redis.Redis(port=sentinel.port, protocol=2) as client:
                client.execute_command("SENTINEL", "MONITOR", MASTER, "127.0.0.1", str(self.replica.port), "2")

    def replica_is_master(self) -> bool:
        """Whether the former replica is the master, also according to every Sentinel."""
        with redis.Redis(port=self.replica.port, protocol=2) as client:
            promoted = client.execute_command("ROLE")[0] == b"master"
        return promoted and all(self._state(s)["port"] == self.replica.port for s in self.sentinels)

    def replicate(self) -> None:
        """Return when the replica has every write the master acknowledged."""
        with redis.Redis(port=self.master.port, protocol=2) as client:
            # WAIT covers the writes of its own connection, and replication keeps the order of all writes.
            client.set("marker", 1, ex=60)
            assert client.wait(1, 10_000) == 1

    def _server(self, name: str, *arguments: str) -> RedisProcess:
        folder = self._folder / name
        folder.mkdir()
        return RedisProcess(folder, "--repl-diskless-sync-delay", "0", *arguments)

    def _start(self, process: _Process) -> _Process:
        self._started.append(process)
        return process.start()

    def _is_ready(self, sentinel: SentinelProcess) -> bool:
        state = self._state(sentinel)
        return (int(state["num-slaves"]), int(state["num-other-sentinels"])) == (1, 2)

    def _state(self, sentinel: SentinelProcess) -> dict[str, int]:
        with redis.Redis(port=sentinel.port, protocol=2, decode_responses=True) as client:
            state: dict[str, int] = client.sentinel_master(MASTER)
        return state


def sentinel_url(*ports: int, scheme: str = "redis+sentinel", user: str = "", rest: str = f"/{MASTER}") -> str:
    """Return a store URL that names Sentinels on this host."""
    return f"{scheme}://{user}{','.join(f'127.0.0.1:{port}' for port in ports)}{rest}"
