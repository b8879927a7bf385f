"""Injects the faults of a run. The seed decides their order and the pauses between them."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence

from tests.stress.chaos.fleet import Fleet


class Nemesis:
    """Injects faults of the given kinds about equally often, each at least once."""

    def __init__(self, fleet: Fleet, kinds: Sequence[str], rng: random.Random) -> None:
        self._fleet = fleet
        self._kinds = list(kinds)
        self._rng = rng
        self.injected: Counter[str] = Counter()

    async def run(self, until_ns: int) -> None:
        """Inject one fault after another until `until_ns`; every fault is over on return."""
        faults, rng = self._fleet.faults, self._rng
        if not self._kinds:
            await asyncio.sleep((until_ns - time.monotonic_ns()) / 1e9)
            return
        while True:
            rng.shuffle(self._kinds)
            for kind in self._kinds:
                await asyncio.sleep(rng.uniform(0.1, 0.5))
                if time.monotonic_ns() > until_ns and len(self.injected) == len(self._kinds):
                    return
                await self._fleet.store.settle()
                await faults[kind](rng.uniform(0.2, 1.5))
                await self._fleet.store.settle()
                self.injected[kind] += 1
