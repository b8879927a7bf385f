"""Injects the faults of a run. The seed decides their order and the pauses between them."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence

from tests.stress.chaos.cluster import Cluster
from tests.stress.chaos.proxy import PROXY_FAULTS
from tests.support.polling import POLL_S

FAULTS = ("pause-server", "pause-redis", "kill-server", "terminate-server", "kill-redis", *PROXY_FAULTS)


class Nemesis:
    """Injects faults of the given kinds about equally often, each at least once."""

    def __init__(self, cluster: Cluster, kinds: Sequence[str], rng: random.Random) -> None:
        self._cluster = cluster
        self._kinds = list(kinds)
        self._rng = rng
        self.injected: Counter[str] = Counter()

    async def run(self, until_ns: int) -> None:
        """Inject one fault after another until `until_ns`; every fault is over on return."""
        while True:
            self._rng.shuffle(self._kinds)
            for kind in self._kinds:
                await asyncio.sleep(self._rng.uniform(0.1, 0.5))
                if time.monotonic_ns() > until_ns and len(self.injected) == len(self._kinds):
                    return
                await self._inject(kind)
                self.injected[kind] += 1

    async def _inject(self, kind: str) -> None:
        cluster, rng = self._cluster, self._rng
        # Drawn for every kind, so that the choices of a seed do not depend on the kinds in use.
        number, seconds = rng.randrange(len(cluster.servers)), rng.uniform(0.2, 1.5)
        if kind == "pause-server":
            cluster.servers[number].signal(signal.SIGSTOP)
            await asyncio.sleep(seconds)
            cluster.servers[number].signal(signal.SIGCONT)
        elif kind == "pause-redis":
            cluster.redis.pause()
            await asyncio.sleep(seconds)
            cluster.redis.resume()
        elif kind == "kill-server":
            await cluster.replace_server(number, signal.SIGKILL)
        elif kind == "terminate-server":
            await cluster.replace_server(number, signal.SIGTERM)
        elif kind == "kill-redis":
            await cluster.restart_redis(seconds / 3)
        else:
            struck = cluster.proxy.struck
            before = struck[kind]
            cluster.proxy.fault = kind
            await asyncio.sleep(seconds)
            # Servers may have been reconnecting, or the machine may have stalled, so that no traffic met the fault yet.
            while struck[kind] == before:  # noqa: ASYNC110 - a plain counter, no event
                await asyncio.sleep(POLL_S)
            cluster.proxy.fault = ""
