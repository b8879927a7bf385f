"""What stands behind the services: Redis, the dedup service and PostgreSQL, the last two behind fault proxies."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.stress.fleet.history import Disturbance, History, Row
from tests.support.fault_proxy import FaultProxy
from tests.support.postgresql import PostgresqlProcess
from tests.support.processes import RedisProcess, ServiceProcess

# The table has no unique constraint: only the guards keep a key from being paid twice. The trigger makes the work last
# as many milliseconds as the amount says, in every language alike.
_SCHEMA = """
CREATE TABLE rewards (id bigserial, idempotency_key text, unit text, amount int, paid_by text);
CREATE FUNCTION work() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_sleep(NEW.amount / 1000.0); RETURN NEW; END $$;
CREATE TRIGGER work BEFORE INSERT ON rewards FOR EACH ROW EXECUTE FUNCTION work();
"""
# Clients back off for up to a second before they connect again.
_RECONNECTED_S = 2.0
_STALL_S = 0.5

Fault = Callable[[], Awaitable[None]]


class Deployment:
    """Starts, disturbs and ends the servers, and records each disturbance."""

    def __init__(self, folder: Path, history: History, rng: random.Random) -> None:
        self._history = history
        self._rng = rng
        self._redis = RedisProcess(folder)
        self._database = PostgresqlProcess()
        self._server: ServiceProcess | None = None
        self._claims = FaultProxy(0)
        self._rows = FaultProxy(0)
        self._open = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            self._open.callback(self._redis.stop)
            self._open.callback(self._database.stop)
            await asyncio.gather(asyncio.to_thread(self._redis.start), asyncio.to_thread(self._database.start))
            await self._query(_SCHEMA)
            self._open.callback(self._stop_server)
            await self._start_server()
            self._rows.upstream_port = self._database.port
            await self._open.enter_async_context(self._claims)
            await self._open.enter_async_context(self._rows)
        except BaseException:
            await self._open.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.aclose()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a service."""
        return {
            "DEDUP_TARGET": f"127.0.0.1:{self._claims.port}",
            "DATABASE_URL": self._database.url(self._rows.port),
        }

    @property
    def faults(self) -> dict[str, Fault]:
        """The faults, by name."""
        return {
            "kill-dedup-service": self._kill_server,
            "cut-claim-connections": self.cut_claim_connections,
            "lose-claim-replies": self._lose_claim_replies,
            "lose-database-replies": self._lose_database_replies,
        }

    async def rows(self) -> list[Row]:
        """Return all rows."""
        found = await self._query("SELECT id, idempotency_key, paid_by FROM rewards ORDER BY id")
        return [Row(row_id=int(number), key=key, paid_by=payer) for number, key, payer in found]

    async def is_working(self) -> bool:
        """Return whether an insert is running. One may outlive the service that sent it."""
        active = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid()"
        return await self._query(f"{active} AND backend_type = 'client backend'") != [["0"]]

    async def cut_claim_connections(self) -> None:
        """Reset the connections between the services and the dedup service."""
        async with self._disturbance("cut-claim-connections", "claims"):
            self._claims.drop_connections()

    async def _kill_server(self) -> None:
        assert self._server is not None
        async with self._disturbance("kill-dedup-service", "claims"):
            await asyncio.to_thread(self._server.kill)
            await self._start_server()

    async def _lose_claim_replies(self) -> None:
        async with self._disturbance("lose-claim-replies", "claims"):
            await self._lose_replies(self._claims)

    async def _lose_database_replies(self) -> None:
        async with self._disturbance("lose-database-replies", "database"):
            await self._lose_replies(self._rows)

    async def _lose_replies(self, proxy: FaultProxy) -> None:
        proxy.swallow_replies = True
        await asyncio.sleep(self._rng.uniform(0.1, 0.5))
        proxy.swallow_replies = False

    @contextlib.asynccontextmanager
    async def _disturbance(self, kind: str, subject: str) -> AsyncIterator[None]:
        """Record what happens inside the block, until the services have certainly connected again."""
        begin_ns = time.monotonic_ns()
        yield
        end_ns = time.monotonic_ns() + int(_RECONNECTED_S * 1e9)
        self._history.disturbances.append(Disturbance(kind=kind, subject=subject, begin_ns=begin_ns, end_ns=end_ns))

    def _stop_server(self) -> None:
        if self._server is not None:
            self._server.kill()

    async def _start_server(self) -> None:
        self._server = ServiceProcess("--store-url", self._redis.url)
        await asyncio.to_thread(self._server.start)
        self._claims.upstream_port = int(self._server.target.rpartition(":")[2])

    async def _query(self, statement: str) -> list[list[str]]:
        return await asyncio.to_thread(self._database.query, statement)


async def watch_stalls(history: History) -> None:
    """Record each moment in which this process did not run for long, as then no other may have either."""
    while True:
        begin_ns = time.monotonic_ns()
        await asyncio.sleep(0.05)
        end_ns = time.monotonic_ns()
        if end_ns - begin_ns > _STALL_S * 1e9:
            history.disturbances.append(Disturbance(kind="stall", subject="machine", begin_ns=begin_ns, end_ns=end_ns))
