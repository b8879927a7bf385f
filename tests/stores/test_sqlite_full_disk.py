"""The embedded store on a full disk: a small file system mounted for this test."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dedup_service.claims import Applied, StoreUnavailable
from dedup_service.stores.sqlite.store import SqliteStore
from dedup_service.stores.stored_value import prefixed_layout
from tests.support.claims import MINUTE, a_claim
from tests.support.polling import eventually

LAYOUT = prefixed_layout("dedup:")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, if this process may mount one."""
    if sys.platform != "linux":
        pytest.skip("a tmpfs can be mounted on Linux alone")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"this process may not mount a tmpfs: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_full_disk_is_never_a_claim(small_disk: Path) -> None:
    """On a full disk a claim is an error and earlier claims stay; with free space the store serves again.

    Protection: a batch is answered only after its commit.
    """
    path = small_disk / "claims.db"
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
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
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
