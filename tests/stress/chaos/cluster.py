"""What a run consists of: one Redis that keeps what it acknowledged, servers at fixed addresses, client processes."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.stress.chaos.client import Orders
from tests.stress.chaos.proxy import LossyProxy
from tests.support.processes import RedisProcess, ServiceProcess

# Second processes find the tests' modules, the mutants among them, where this one does.
_ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class Cluster:
    """Starts, breaks and ends processes; Unix sockets in `folder` keep their addresses over restarts."""

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
        """End a server by a signal, and return when another serves at its address."""
        self.servers[number].signal(how)
        await asyncio.to_thread(self.servers[number].wait)
        server = self.servers[number] = self._new_server(self.targets[number])
        await asyncio.to_thread(server.start)

    async def restart_redis(self, away_s: float) -> None:
        """Kill Redis, and start it again on its own files."""
        self.redis.stop()
        await asyncio.sleep(away_s)
        await asyncio.to_thread(self.redis.start)

    def start_client(self, orders: Orders) -> None:
        """Start a client process, which calls until it is told to stop."""
        command = [sys.executable, "-m", "tests.stress.chaos.client", orders.to_argument()]
        self._clients.append(subprocess.Popen(command, env=os.environ | _ENVIRONMENT, stdin=subprocess.PIPE))

    async def stop_clients(self) -> None:
        """Let every client process finish its calls and end; fail when one of them failed."""
        for client in self._clients:
            assert client.stdin is not None
            client.stdin.close()
        codes = await asyncio.gather(*(asyncio.to_thread(client.wait, 60) for client in self._clients))
        assert not any(codes), f"client processes ended with {codes}"

    def _new_server(self, target: str) -> ServiceProcess:
        # The second --listen is the one that counts.
        arguments = ("--listen", target, "--store-url", self.proxy.url, "--store-timeout", "500ms")
        return ServiceProcess(*arguments, "--shutdown-grace", "1s", environment=_ENVIRONMENT, command=self._command)
