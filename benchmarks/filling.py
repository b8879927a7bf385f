"""Fills stores with live or expired claims in the service's format."""

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import redis

from dedup_service.claims import Transaction, system_clock_ms
from dedup_service.stores.sqlite.file import ClaimFile
from dedup_service.stores.stored_value import encode, prefixed_layout

SEED = 20251128
LIFE_MS = 86_400_000
# As long as a generated token.
_TOKEN = "T" * 22
# Runs inside Redis: ten million commands would take minutes.
_FILL = """
for number = ARGV[1], ARGV[2] - 1 do
  local value = ARGV[4] .. string.format('%022d', number) .. ARGV[5]
  redis.call('SET', string.format(ARGV[3], number), ARGV[4] == '' and ARGV[5] or value, 'PX', ARGV[6])
end
"""
_CHUNK = 20_000
_LAYOUT = prefixed_layout("dedup:")

Progress = Callable[[int], None]


def transaction_id(number: int) -> str:
    """Return the id of a held transaction, as of the lucky box."""
    return f"lucky_box:{100_000_000 + number}:405:daily:2025-11-28"


def a_claim(number: int, expire_time_ms: int) -> Transaction:
    """Return a claim made the default ttl before its expiry."""
    return Transaction("default", transaction_id(number), f"{number:022}", "", expire_time_ms - 60_000, expire_time_ms)


def fill_redis(url: str, count: int, progress: Progress, *, bare: bool = False) -> None:
    """Store `count` live claims, or with `bare` msgpack `true`, as a service with its own SETNX does."""
    now_ms = system_clock_ms()
    value = encode(Transaction("default", "", _TOKEN, "", now_ms, now_ms + LIFE_MS))
    head, _, tail = value.partition(_TOKEN.encode())
    if bare:
        head, tail = b"", b"\xc3"
    key = _LAYOUT("default", "lucky_box:1%08d:405:daily:2025-11-28")
    with redis.Redis.from_url(url) as client:
        fill = client.register_script(_FILL)
        for begin in range(0, count, _CHUNK):
            fill(args=(begin, min(count, begin + _CHUNK), key, head, tail, LIFE_MS))
            progress(min(count, begin + _CHUNK))


def fill_sqlite(path: Path, count: int, progress: Progress, *, expired: bool = False) -> None:
    """Create a claim file of `count` rows in random key order: live, or expired within a minute."""
    file = ClaimFile(path, system_clock_ms)
    file.begin()
    file.close()
    chance = random.Random(SEED)  # noqa: S311 - seeds a benchmark
    now_ms = system_clock_ms()
    numbers = list(range(count))
    chance.shuffle(numbers)
    with sqlite3.connect(path, isolation_level=None) as connection:
        for begin in range(0, count, _CHUNK):
            connection.execute("BEGIN")
            rows = []
            for number in numbers[begin : begin + _CHUNK]:
                claim = a_claim(number, now_ms - chance.randrange(1, 60_000) if expired else now_ms + LIFE_MS)
                rows.append((_LAYOUT("default", claim.transaction_id), encode(claim), claim.expire_time_ms))
            connection.executemany("INSERT INTO claims VALUES (?, ?, ?)", rows)
            connection.execute("COMMIT")
            progress(min(count, begin + _CHUNK))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    connection.close()
