"""The rewards that were paid: in memory, or in the table `rewards` of a PostgreSQL."""

import os
import threading
from dataclasses import dataclass
from typing import Any, Protocol

NAME = os.environ.get("NAME", "rewards-python")

# No unique constraint, so that a reward paid twice is visible. A real table has one on the key.
TABLE = """
CREATE TABLE IF NOT EXISTS rewards (id bigserial, idempotency_key text, unit text, amount int, paid_by text)
"""
INSERT = "INSERT INTO rewards (idempotency_key, unit, amount, paid_by) VALUES (%s, %s, %s, %s) RETURNING id"
SELECT = "SELECT id, idempotency_key, unit, amount, paid_by FROM rewards ORDER BY id"


@dataclass(frozen=True)
class Reward:
    """A paid reward."""

    id: int
    idempotency_key: str
    unit: str
    amount: int
    paid_by: str


class Ledger(Protocol):
    """Pays rewards and lists them."""

    def pay(self, key: str, unit: str, amount: int) -> int:
        """Pay a reward, and return its number. This is the effect that must not happen twice."""

    def paid(self) -> list[Reward]:
        """Return the rewards in the order of payment."""

    def close(self) -> None:
        """Close the connections."""


def open_ledger() -> Ledger:
    """Return the ledger in the PostgreSQL of DATABASE_URL, or one in memory."""
    url = os.environ.get("DATABASE_URL")
    return PostgresLedger(url) if url else MemoryLedger()


class MemoryLedger:
    """Forgets the rewards at the end of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._paid: list[Reward] = []

    def pay(self, key: str, unit: str, amount: int) -> int:
        """See Ledger.pay."""
        with self._lock:
            reward = Reward(len(self._paid) + 1, key, unit, amount, NAME)
            self._paid.append(reward)
        return reward.id

    def paid(self) -> list[Reward]:
        """See Ledger.paid."""
        with self._lock:
            return list(self._paid)

    def close(self) -> None:
        """See Ledger.close."""


class PostgresLedger:
    """Pays a reward by one INSERT, which commits at once."""

    def __init__(self, url: str) -> None:
        # Imported here: the ledger in memory needs no PostgreSQL driver.
        from psycopg_pool import ConnectionPool

        self._pool: Any = ConnectionPool(url, min_size=1, max_size=4, kwargs={"autocommit": True}, open=True)
        with self._pool.connection() as connection, connection.transaction():
            # Concurrent CREATE TABLE IF NOT EXISTS can fail in PostgreSQL. The number is arbitrary.
            connection.execute("SELECT pg_advisory_xact_lock(7382)")
            connection.execute(TABLE)

    def pay(self, key: str, unit: str, amount: int) -> int:
        """See Ledger.pay."""
        with self._pool.connection() as connection:
            number: int = connection.execute(INSERT, (key, unit, amount, NAME)).fetchone()[0]
        return number

    def paid(self) -> list[Reward]:
        """See Ledger.paid."""
        with self._pool.connection() as connection:
            return [Reward(*row) for row in connection.execute(SELECT)]

    def close(self) -> None:
        """See Ledger.close."""
        self._pool.close()
