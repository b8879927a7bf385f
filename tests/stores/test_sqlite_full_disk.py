"""The embedded store on a full disk: a small file system mounted for this test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dedup_service.claims import Applied, StoreUnavailable
from dedup_service.stores.sqlite.store import SqliteStore
from dedup_service.stores.stored_value import prefixed_layout
from tests.support.claims import MINUTE, a_claim
from tests.support.disks import fill, small_disk
from tests.support.polling import eventually

LAYOUT = prefixed_layout("dedup:")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, if this process may mount one."""
    with small_disk(tmp_path) as disk:
        yield disk


async def test_a_full_disk_is_never_a_claim(disk: Path) -> None:
    """On a full disk a claim is an error and earlier claims stay; with free space the store serves again.

    Protection: a batch is answered only after its commit.
    """
    path = disk / "claims.db"
    store = SqliteStore(path, LAYOUT, timeout_ms=20_000)
    await store.open()
    held: list[str] = []
    refused: list[str] = []
    failures: list[StoreUnavailable] = []

    async def claim(transaction_id: str) -> None:
        try:
            assert await store.claim(a_claim(transaction_id), MINUTE) is None
        except StoreUnavailable as failure:
            failures.append(failure)
            if failure.applied is Applied.NO:
                refused.append(transaction_id)
        else:
            held.append(transaction_id)

    for number in range(20):
        await claim(f"before:{number}")
    assert not failures
    filler = fill(disk)
    number = 0
    while len(failures) < 5:
        # Space already allocated in the log may take a few.
        assert number < 10_000
        await claim(f"during:{number}")
        number += 1
    assert {failure.reason for failure in failures} <= {"STORE_FULL", "STORE_IO_ERROR", "STORE_CANNOT_OPEN"}
    filler.unlink()

    async def serves() -> bool:
        await claim(f"after:{len(failures)}")
        return held[-1].startswith("after")

    await eventually(serves, what="the store to serve again")
    await store.close()
    again = SqliteStore(path, LAYOUT)
    await again.open()
    assert [name for name in held if await again.get("default", name) is None] == []
    assert [name for name in refused if await again.get("default", name) is not None] == []
    await again.close()
