"""The servers of a run, at fixed addresses over one store, and the clients."""

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

from dedup_service.config.settings import EngineName
from tests.stress.chaos.client import ClientConfig
from tests.stress.chaos.deployments import DEPLOYMENTS, Fault
from tests.support.processes import ServiceProcess

_ROOT = Path(__file__).parents[3]
_ENGINES = get_args(EngineName)


class Fleet:
    """Starts, disturbs and ends processes. Unix sockets in `folder` keep their addresses across restarts.

    The servers use the engines in turn, so that two of them show both.
    """

    def __init__(self, folder: Path, deployment: str, servers: int, mutation: str, rng: random.Random) -> None:
        self._command = ("tests.stress.chaos.mutants", mutation) if mutation else ("dedup_service",)
        self._rng = rng
        self.store = DEPLOYMENTS[deployment](folder, rng)
        self.targets = [f"unix://{folder}/server-{number}.sock" for number in range(servers)]
        self._servers: list[ServiceProcess] = []
        self._clients: list[subprocess.Popen[bytes]] = []

    async def __aenter__(self) -> Self:
        try:
            await self.store.start()
            await self.store.settle()
            self._servers += [self._new_server(number) for number in range(len(self.targets))]
            for server in self._servers:
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
        for server in self._servers:
            server.kill()
        await self.store.stop()

    @property
    def faults(self) -> Mapping[str, Fault]:
        """The faults of the servers and of the store, by name."""
        return {
            "pause-server": self._pause,
            "kill-server": lambda _: self._replace(signal.SIGKILL),
            "terminate-server": lambda _: self._replace(signal.SIGTERM),
            **self.store.faults,
        }

    async def _pause(self, seconds: float) -> None:
        server = self._rng.choice(self._servers)
        server.signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        server.signal(signal.SIGCONT)

    async def _replace(self, how: signal.Signals) -> None:
        """End a server by a signal, and return when its replacement serves at the same address."""
        number = self._rng.randrange(len(self._servers))
        self._servers[number].signal(how)
        await asyncio.to_thread(self._servers[number].wait)
        server = self._servers[number] = self._new_server(number)
        await asyncio.to_thread(server.start)

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

    def _new_server(self, number: int) -> ServiceProcess:
        # The last --listen wins.
        return ServiceProcess(
            *("--listen", self.targets[number], "--engine", _ENGINES[number % len(_ENGINES)]),
            *("--store-timeout", "500ms", "--shutdown-grace", "1s", *self.store.arguments),
            command=self._command,
        )
