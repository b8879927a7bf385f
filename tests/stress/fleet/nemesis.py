"""Injects the faults of a run. The seed decides their order and the pauses between them."""

import asyncio
import random
import time
from collections.abc import Mapping

from tests.stress.fleet.deployment import Fault

_PAUSE_S = (0.2, 1.5)


class Nemesis:
    """Injects each of the faults about equally often, and at least once."""

    def __init__(self, faults: Mapping[str, Fault], rng: random.Random) -> None:
        self._faults = faults
        self._rng = rng

    async def run(self, until_ns: int) -> None:
        """Inject one fault after another until `until_ns`; every fault is over on return."""
        rounds = 0
        kinds = list(self._faults)
        while True:
            self._rng.shuffle(kinds)
            for kind in kinds:
                await asyncio.sleep(self._rng.uniform(*_PAUSE_S))
                if rounds and time.monotonic_ns() > until_ns:
                    return
                await self._faults[kind]()
            rounds += 1
