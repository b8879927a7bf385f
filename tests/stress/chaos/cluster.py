"""The processes of a run: one Redis that fsyncs every write, servers at fixed addresses, and clients."""

import asyncio
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.stress.chaos.client import ClientConfig
from tests.stress.chaos.proxy import LossyProxy
from tests.support.processes import RedisProcess, ServiceProcess

_ROOT = Path(__file__).parents[3]


class Cluster:
    """Starts, disturbs and ends processes. Unix sockets in `folder` keep their addresses across restarts."""

    def __init__(self, folder: Path, servers: int, mutation: str, rng: random.Random) -> None:
        self._folder = folder
        self._command = ("tests.stress.chaos.mutants", mutation) if mutation else ("dedup_service",)
        self.redis = RedisProcess(folder, "--appendonly", "yes", "--appendfsync", "always")
        self.proxy = LossyProxy(self.redis.socket_path, rng)
        self.targets = [f"unix://{folder}/server-{number}.sock" for number in range(servers)]
        self.servers: list[ServiceProcess] = []
        self._clients: list[subprocess.Popen[bytes]] = []

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self.redis.start)
            await self.proxy.__aenter__()
            self.servers += [self._new_server(target) for target in self.targets]
            for server in self.servers:
                await asyncio.to_thread(server.start)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.kill()
            client.wait()
        for server in self.servers:
            server.kill()
        if self.proxy.is_open:
            await self.proxy.__aexit__(kind, error, trace)
        self.redis.stop()

    async def replace_server(self, number: int, how: signal.Signals) -> None:
        """End a server by a signal, and return when its replacement serves at the same address."""
        self.servers[number].signal(how)
        await asyncio.to_thread(self.servers[number].wait)
        server = self.servers[number] = self._new_server(self.targets[number])
        await asyncio.to_thread(server.start)

    async def restart_redis(self, away_s: float) -> None:
        """Kill Redis, and restart it from its own files."""
        self.redis.stop()
        await asyncio.sleep(away_s)
        await asyncio.to_thread(self.redis.start)

    def start_client(self, config: ClientConfig) -> None:
        """Start a client process, which calls until `stop_clients`."""
        command = [sys.executable, "-m", "tests.stress.chaos.client", config.to_argument()]
        self._clients.append(subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE))

    async def stop_clients(self) -> None:
        """Let every client process finish its calls and exit; fail if one exits with an error."""
        for client in self._clients:
            assert client.stdin is not None
            client.stdin.close()
        codes = await asyncio.gather(*(asyncio.to_thread(client.wait, 60) for client in self._clients))
        assert not any(codes), f"client processes ended with {codes}"

    def _new_server(self, target: str) -> ServiceProcess:
        # The last --listen wins.
        arguments = ("--listen", target, "--store-url", self.proxy.url, "--store-timeout", "500ms")
        return ServiceProcess(*arguments, "--shutdown-grace", "1s", command=self._command)
