"""Measures what reclaiming expired rows of the embedded store costs the claims that are made meanwhile.

Two stores take turns of a second with the same steady load of claims: one has a backlog of expired rows, the other has
none and is the control, so that what the disk and the machine do to both can be told from what reclaiming does.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.figures import percentile
from benchmarks.filling import fill_sqlite
from dedup_service.claims import Expiry, Transaction, system_clock_ms
from dedup_service.stores.keys import prefixed_layout
from dedup_service.stores.sqlite.file import ClaimFile
from dedup_service.stores.sqlite.store import SqliteStore
from dedup_service.stores.sqlite.thread import BatchThread

PAUSE_LIMIT_MS = 5
_PAUSE_S = 0.004
_TURN_S = 1.0


class TimedFile(ClaimFile):
    """A claim file that notes how long each step of upkeep takes, and takes none while it is not its turn."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, system_clock_ms)
        self.turn = False
        self.upkeep_us: list[int] = []

    def upkeep(self) -> bool:
        """Take a step, as ClaimFile does."""
        if not self.turn:
            return False
        begun = time.perf_counter()
        more = super().upkeep()
        if more:
            self.upkeep_us.append(round((time.perf_counter() - begun) * 1e6))
        return more


class Subject:
    """One store under load."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = TimedFile(path)
        self.claims_us: list[int] = []
        self._number = 0
        self._store = SqliteStore(path, prefixed_layout("dedup:"))
        # The store itself would make a file that is not timed.
        self._store._thread = BatchThread(self.file, self.file.name, 5.0, 10_000, 0.01)  # noqa: SLF001
        self._store._thread.start()  # noqa: SLF001

    async def take_turn(self, seconds: float) -> None:
        """Claim fresh ids for a while, one after the other with a pause between."""
        self.file.turn = True
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self._number += 1
            now_ms = system_clock_ms()
            claim = Transaction("default", f"live:{self._number}", "T" * 22, "", now_ms, now_ms + 3_600_000)
            begun = time.perf_counter()
            if await self._store.claim(claim, Expiry(now_ms + 3_600_000, 3_600_000)) is not None:
                raise AssertionError("a fresh id was held")
            self.claims_us.append(round((time.perf_counter() - begun) * 1e6))
            await asyncio.sleep(_PAUSE_S)
        self.file.turn = False

    async def close(self) -> None:
        """Close the store."""
        await self._store.close()


async def measure(rows: int, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of both stores after as many seconds of each, or when the backlog is gone."""
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as folder:
        backlog, control = Path(folder) / "backlog.db", Path(folder) / "control.db"
        fill_sqlite(backlog, rows, lambda done: say(f"{done:,} of {rows:,} expired rows"), expired=True)
        fill_sqlite(control, 0, lambda _: None)
        subjects = {"control": Subject(control), "reclaiming": Subject(backlog)}
        turns = max(1, round(seconds / _TURN_S))
        for turn in range(turns):
            for subject in subjects.values():
                await subject.take_turn(min(seconds, _TURN_S))
            say(f"reclaiming, turn {turn + 1} of {turns}")
        figures: dict[str, Any] = {"rows": rows, "seconds": turns * min(seconds, _TURN_S)}
        for name, subject in subjects.items():
            await subject.close()
            figures[name] = {"claims": distribution(subject.claims_us), "upkeep": distribution(subject.file.upkeep_us)}
        figures["rows_left"] = expired_rows(backlog)
    return figures


def expired_rows(path: Path) -> int:
    """Return how many rows of a closed file have expired."""
    file = ClaimFile(path, system_clock_ms)
    file.begin()
    ((count,),) = file._execute("SELECT count(*) FROM claims WHERE expire_time_ms <= ?", (system_clock_ms(),))  # noqa: SLF001
    file.close()
    return int(count)


def distribution(values_us: list[int]) -> dict[str, float]:
    """Return the count, percentiles in milliseconds, and how many were above the limit of a pause."""
    ordered = sorted(values_us)
    if not ordered:
        return {"count": 0}
    figures = {f"p{percent:g}_ms": percentile(ordered, percent) / 1_000 for percent in (50, 99, 99.9)}
    above = sum(value > PAUSE_LIMIT_MS * 1_000 for value in ordered)
    return {"count": len(ordered), **figures, "max_ms": ordered[-1] / 1_000, "above_limit": above}
