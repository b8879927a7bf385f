"""Cases particular to the embedded store: one file, several processes, a disk that may fail."""

import asyncio
import contextlib
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dedup_service.claims import (
    Applied,
    InvalidRequest,
    StoreRefused,
    StoreUnavailable,
    Transaction,
    UnreadableValue,
    system_clock_ms,
)
from dedup_service.stores.sqlite import file as sqlite_file
from dedup_service.stores.sqlite.store import SqliteStore
from dedup_service.stores.sqlite.thread import MAX_BATCH, Operation
from dedup_service.stores.stored_value import prefixed_layout
from tests.support.claims import MINUTE, a_claim, claim_to_end, lasting
from tests.support.polling import eventually, wait_until

LAYOUT = prefixed_layout("dedup:")
# For the cases that are not about the timeout: a loaded machine may take long.
TIMEOUT_MS = 20_000

# The head of the child processes; each opens `store`.
CHILD = """
import asyncio, os, random, resource, sys
from pathlib import Path
from tests.support.claims import MINUTE, a_claim
from dedup_service.claims import StoreRefused, StoreUnavailable
from dedup_service.stores.stored_value import prefixed_layout
from dedup_service.stores.sqlite.store import SqliteStore
store = SqliteStore(Path(sys.argv[1]), prefixed_layout("dedup:"), timeout_ms=20_000)
"""

RACER = """
async def main():
    await store.open()
    print("ready", flush=True)
    sys.stdin.readline()
    # Each process in another order, so that none is ahead of the others.
    numbers = list(range(500))
    random.Random(sys.argv[2]).shuffle(numbers)
    async def worker():
        while numbers:
            number = numbers.pop()
            claim = a_claim(f"lucky_box:{number}", token=f"process-{os.getpid():010}")
            if await store.claim(claim, MINUTE) is None:
                print(number, flush=True)
    await asyncio.gather(*(worker() for _ in range(8)))
    await store.close()
"""

CLAIMS_FOR_EVER = """
async def main():
    await store.open()
    async def one(worker):
        for number in range(10**9):
            if await store.claim(a_claim(f"{worker}:{number}"), MINUTE) is None:
                print(f"{worker}:{number}", flush=True)
    await asyncio.gather(*(one(worker) for worker in range(16)))
"""

OPENS = """
async def main():
    await store.open()
    await store.close()
"""

OPENS_AS_NOBODY = """
async def main():
    # Root may write anything, so drop its rights.
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    try:
        await store.open()
    except StoreRefused as refusal:
        print(f"refused: {refusal}")
    else:
        print("opened")
        await store.close()
"""

FILLS_THE_DISK = """
def limit(size):
    # No file may grow beyond it, which to a write looks like a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main():
    await store.open()
    await store.claim(a_claim("before"), MINUTE)
    for call in (store.claim(a_claim("during"), MINUTE), store.check()):
        await store.check()
        limit(os.stat(sys.argv[1] + "-wal").st_size)
        try:
            print(await call)
        except StoreUnavailable as error:
            print(error.reason, error.applied.value)
        limit(resource.RLIM_INFINITY)
    print((await store.claim(a_claim("before"), MINUTE)) is not None)
    print(await store.claim(a_claim("after"), MINUTE))
    await store.close()
"""


def child(script: str, path: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start a process that runs `script` on the store at `path`."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{CHILD}{script}\nasyncio.run(main())", str(path), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def output_of(script: str, path: Path) -> list[str]:
    """Run `script` to its end and return its output lines."""
    with child(script, path) as process:
        output = process.communicate(timeout=20)[0]
    assert process.returncode == 0
    return output.splitlines()


class Clock:
    """A clock set by hand, which can block its readers: the store then stalls inside a batch."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000
        self.reads = 0
        self.running = threading.Event()
        self.running.set()

    def __call__(self) -> int:
        """Return the time once the clock runs."""
        self.reads += 1
        assert self.running.wait(20)
        return self.now_ms

    async def stall(self, store: SqliteStore) -> "asyncio.Task[Any]":
        """Return a check that blocks in its own batch; all later calls wait behind it."""
        self.running.clear()
        reads = self.reads
        task = asyncio.create_task(store.check())
        await eventually(lambda: _later(self.reads > reads))
        return task


async def _later(value: object) -> object:
    return value


@pytest.fixture
def clock() -> Iterator[Clock]:
    """A clock set by hand, which runs again at the end."""
    clock = Clock()
    yield clock
    clock.running.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file and a folder that do not exist yet."""
    return tmp_path / "state" / "claims.db"


@pytest.fixture
async def store(path: Path, clock: Clock) -> AsyncIterator[SqliteStore]:
    """An open store that looks for expired claims every 10 ms."""
    store = SqliteStore(path, LAYOUT, timeout_ms=TIMEOUT_MS, clock_ms=clock, idle_ms=10)
    await store.open()
    yield store
    clock.running.set()
    await store.close()


def claim_for(number: object, expire_time_ms: int = 2_000_000) -> Transaction:
    """Return a claim for a clock set by hand."""
    return a_claim(f"lucky_box:{number}", expire_time_ms=expire_time_ms)


def rows(path: Path) -> dict[str, int]:
    """Return the expiry of each stored key, as another process sees it."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT key, expire_time_ms FROM claims").fetchall()
    return {key.decode(): expire_time_ms for key, expire_time_ms in found}


async def unavailable(call: "asyncio.Future[Any]") -> tuple[str, Applied]:
    """Return reason and `applied` of a failed call."""
    with pytest.raises(StoreUnavailable) as failure:
        await call
    return failure.value.reason, failure.value.applied


def test_processes_that_race_for_the_same_ids_have_one_winner_each(path: Path) -> None:
    """Of four processes that claim the same 500 ids in one new file at once, exactly one wins each id."""
    with contextlib.ExitStack() as stack:
        racers = [stack.enter_context(child(RACER, path, f"{seed}")) for seed in range(4)]
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        outputs = [racer.communicate(timeout=20)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    winners = Counter(number for output in outputs for number in output)
    assert winners == {str(number): 1 for number in range(500)}
    assert all(outputs), "no race took place"


async def test_an_acknowledged_claim_survives_kill_9(path: Path) -> None:
    """Every claim that a process acknowledged before it was killed is held when the file is opened again."""
    with child(CLAIMS_FOR_EVER, path) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().strip() for _ in range(1_000)]
        process.kill()
        # The last line may be cut short.
        acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
    assert process.returncode == -signal.SIGKILL
    store = SqliteStore(path, LAYOUT, timeout_ms=TIMEOUT_MS)
    await store.open()
    holders = await asyncio.gather(*(store.get("default", name) for name in acknowledged))
    await store.close()
    assert all(holders)


async def test_commits_are_synced(path: Path) -> None:
    """The connection syncs every commit, in a write-ahead log."""
    file = sqlite_file.ClaimFile(path, system_clock_ms)
    assert file.begin()
    assert file._execute("PRAGMA synchronous").fetchall() == [(2,)]
    assert file._execute("PRAGMA journal_mode").fetchall() == [("wal",)]
    file.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file in a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def a_text_file(path: Path) -> None:
    """Make a file that is not a database."""
    path.write_text("claims, by hand\n" * 1_000)


def a_damaged_database(path: Path) -> None:
    """Make a database of ours whose pages after the first are overwritten."""
    file = sqlite_file.ClaimFile(path, system_clock_ms)
    assert file.begin()
    file._keep([(b"key %d" % number, b"value", 2**60) for number in range(1_000)])
    file._execute("COMMIT")
    file.close()
    with path.open("r+b") as raw:
        raw.seek(4096)
        raw.write(b"\xa5" * 8192)


def a_foreign_database(path: Path) -> None:
    """Make a database of another application without an application id."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE accounts (id INTEGER PRIMARY KEY)")


def a_marked_foreign_database(path: Path) -> None:
    """Make an empty database that another application marked as its own."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA application_id = 7")


def a_newer_database(path: Path) -> None:
    """Make a database of a later version of this service."""
    file = sqlite_file.ClaimFile(path, system_clock_ms)
    assert file.begin()
    file._execute(f"PRAGMA user_version = {sqlite_file.SCHEMA_VERSION + 1}")
    file._execute("COMMIT")
    file.close()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (a_text_file, "is not a SQLite database"),
        (a_damaged_database, "damaged"),
        (a_foreign_database, "another application"),
        (a_marked_foreign_database, "another application"),
        (a_newer_database, "schema version 2"),
    ],
)
async def test_a_file_that_is_not_ours_is_refused_and_left_alone(path: Path, make: object, sentence: str) -> None:
    """A file that is not a database, damaged, foreign, or of a newer version is refused and not changed."""
    path.parent.mkdir()
    assert callable(make)
    make(path)
    before = contents(path.parent)
    store = SqliteStore(path, LAYOUT, timeout_ms=TIMEOUT_MS)
    with pytest.raises(StoreRefused, match=sentence) as refusal:
        await store.open()
    assert str(path) in str(refusal.value)
    assert contents(path.parent) == before


async def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    """A path that is a folder, or leads through a file, is refused."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "claims.db"):
        with pytest.raises(StoreRefused, match=str(path)):
            await SqliteStore(path, LAYOUT, timeout_ms=TIMEOUT_MS).open()


@pytest.mark.parametrize("forbidden", ["folder", "new file", "file"])
def test_a_file_without_permission_is_refused(forbidden: str) -> None:
    """A process that may not write the file or its folder refuses it at once."""
    # Not below tmp_path, whose parents only its owner may enter.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "claims.db"
        if forbidden != "new file":
            output_of(OPENS, path)
        path.parent.chmod(0o777 if forbidden == "file" else 0o555)
        if forbidden != "new file":
            path.chmod(0o444 if forbidden == "file" else 0o666)
        (line,) = output_of(OPENS_AS_NOBODY, path)
        path.parent.chmod(0o700)
    assert line.startswith("refused: "), line


async def test_only_the_owner_may_read_the_claims(store: SqliteStore, path: Path) -> None:
    """The folder that the store creates has mode 0700, the file and its log 0600."""
    await claim_to_end(store, claim_for(1))
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (path.parent, path, Path(f"{path}-wal"))]
    assert modes == [0o700, 0o600, 0o600]


async def serves(store: SqliteStore) -> bool:
    """Report whether the store answers within its timeout, which a loaded machine may exceed."""
    try:
        await store.check()
    except StoreUnavailable:
        return False
    return True


async def test_a_lock_of_another_process_is_busy_and_not_applied(path: Path) -> None:
    """While another connection holds the lock, a claim fails with STORE_BUSY and is never applied."""
    store = SqliteStore(path, LAYOUT, timeout_ms=100)
    await store.open()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        calls = [store.claim(a_claim(f"{number}"), MINUTE) for number in range(3)]
        failures = [await unavailable(asyncio.ensure_future(call)) for call in calls]
        assert failures == [("STORE_BUSY", Applied.NO)] * 3
        other.execute("COMMIT")
    await eventually(lambda: serves(store))
    assert not rows(path)
    await store.close()


async def test_a_store_that_is_locked_at_the_start_is_tried_again(path: Path) -> None:
    """A file locked by another process does not prevent `open`, and serves once the lock is released."""
    path.parent.mkdir()
    store = SqliteStore(path, LAYOUT, timeout_ms=100)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        await store.open()
        assert await unavailable(asyncio.create_task(store.check())) == ("STORE_BUSY", Applied.NO)

    await eventually(lambda: serves(store))
    await store.close()


async def test_time_spent_waiting_for_the_lock_does_not_shorten_a_claim(
    store: SqliteStore, path: Path, clock: Clock
) -> None:
    """The ttl of a claim begins when its batch holds the write lock, and expired claims are judged then."""
    await claim_to_end(store, claim_for(1, clock.now_ms + 10))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        calls = [asyncio.create_task(store.claim(claim_for(number), lasting(50))) for number in (1, 2)]
        await eventually(lambda: _later(store._thread is not None and store._thread._locked_out))
        clock.now_ms += 20
        other.execute("COMMIT")
    assert await asyncio.gather(*calls) == [None, None]
    assert set(rows(path).values()) == {clock.now_ms + 50}


async def test_an_idle_store_empties_itself(store: SqliteStore, path: Path, clock: Clock) -> None:
    """An idle store deletes expired claims and keeps live ones."""
    await asyncio.gather(*(claim_to_end(store, claim_for(n, clock.now_ms + 10 + n)) for n in range(1_000)))
    assert len(rows(path)) == 1_000
    clock.now_ms += 10 + 998
    await eventually(lambda: _later(len(rows(path)) == 1))
    clock.now_ms += 1
    await eventually(lambda: _later(not rows(path)))


async def test_claims_are_answered_between_the_steps_that_reclaim(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step deletes a few expired claims, and a claim made meanwhile is stored before the next step."""
    monkeypatch.setattr(sqlite_file, "_MAX_STEP_ROWS", 20)
    monkeypatch.setattr(sqlite_file, "_FIRST_STEP_ROWS", 20)
    store = SqliteStore(path, LAYOUT, timeout_ms=TIMEOUT_MS, clock_ms=clock, idle_ms=10)
    await store.open()
    await asyncio.gather(*(store.claim(claim_for(number), lasting(10)) for number in range(500)))
    take_step, loop = sqlite_file.ClaimFile.upkeep, asyncio.get_running_loop()
    deleted: list[int] = []
    calls: list[asyncio.Task[Transaction | None]] = []
    kept_before_the_next_step: list[bool] = []
    queued = threading.Event()

    def claim() -> None:
        calls.append(loop.create_task(store.claim(claim_for("meanwhile"), MINUTE)))
        loop.call_soon(queued.set)

    def step(file: sqlite_file.ClaimFile) -> bool:
        before = rows(path)
        if calls:
            kept_before_the_next_step.append("dedup:default:lucky_box:meanwhile" in before)
        more = take_step(file)
        deleted.append(len(before) - len(rows(path)))
        if more and not calls:
            loop.call_soon_threadsafe(claim)
            queued.wait()
        return more

    monkeypatch.setattr(sqlite_file.ClaimFile, "upkeep", step)
    clock.now_ms += 10
    await eventually(lambda: _later(set(rows(path)) == {"dedup:default:lucky_box:meanwhile"}))
    assert max(deleted) == 20
    assert kept_before_the_next_step
    assert all(kept_before_the_next_step)
    await store.close()


@pytest.mark.parametrize("locked", [False, True])
def test_only_a_step_that_reclaims_does_not_wait_for_the_disk(path: Path, clock: Clock, *, locked: bool) -> None:
    """A deletion that a crash undoes is repeated; commits after the step are synced as before it.

    Also after a step that found the lock taken. Protection: synchronous is FULL again after any step.
    """
    file = sqlite_file.ClaimFile(path, clock)
    assert file.begin()
    file.carry_out([])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("INSERT INTO claims VALUES (x'01', x'01', 1)")
        if locked:
            other.execute("BEGIN IMMEDIATE")
        assert file._connection is not None
        statements: list[str] = []
        file._connection.set_trace_callback(statements.append)
        file.upkeep()
        file._connection.set_trace_callback(None)
        synced = [statement for statement in statements if "synchronous" in statement or "DELETE" in statement]
        assert [text.partition(" WHERE")[0] for text in synced] == [
            "PRAGMA synchronous = NORMAL",
            *([] if locked else ["DELETE FROM claims"]),
            "PRAGMA synchronous = FULL",
        ]
        assert file._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert len(rows(path)) == int(locked)
    file.close()


async def test_a_busy_store_gets_rid_of_expired_claims_too(path: Path, clock: Clock) -> None:
    """Claims delete expired ones, at least as many as they add."""
    store = SqliteStore(path, LAYOUT, timeout_ms=TIMEOUT_MS, clock_ms=clock, idle_ms=1_000_000)
    await store.open()
    await asyncio.gather(*(store.claim(claim_for(f"old {n}"), lasting(10)) for n in range(200)))
    clock.now_ms += 10
    await asyncio.gather(*(store.claim(claim_for(f"new {n}"), lasting(10)) for n in range(100)))
    assert all(b"new" in key.encode() for key in rows(path))
    await store.close()


async def test_an_expired_claim_is_absent_before_it_is_deleted(path: Path, clock: Clock) -> None:
    """After its expiry a claim is neither found nor a duplicate, and its row is replaced."""
    store = SqliteStore(path, LAYOUT, timeout_ms=TIMEOUT_MS, clock_ms=clock, idle_ms=1_000_000)
    await store.open()
    first, second = (a_claim("lucky_box:1", token=f"token-of-attempt-{number}") for number in (1, 2))
    assert await store.claim(first, lasting(10)) is None
    clock.now_ms += 9
    assert await store.claim(second, lasting(10)) == first
    clock.now_ms += 1
    assert await store.get("default", "lucky_box:1") is None
    assert list(rows(path).values()) == [1_000_010]
    assert await store.claim(second, lasting(10)) is None
    assert await store.get("default", "lucky_box:1") == second
    assert list(rows(path).values()) == [1_000_020]
    await store.close()


async def test_a_bad_operation_fails_alone(store: SqliteStore, path: Path, clock: Clock) -> None:
    """In one batch an unreadable value, a past expiry and one beyond 64 bits each fail only their own caller."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("INSERT INTO claims VALUES (?, ?, ?)", (LAYOUT("default", "odd"), b"\x92\x63\x01", 2_000_000))
    stalled = await clock.stall(store)
    calls = [
        store.claim(claim_for(1), lasting(10)),
        store.claim(a_claim("odd"), lasting(10)),
        store.get("default", "odd"),
        claim_to_end(store, claim_for(2, clock.now_ms)),
        store.claim(claim_for(3), lasting(2**63)),
        store.claim(claim_for(4), lasting(10)),
    ]
    answers = asyncio.gather(*calls, return_exceptions=True)
    await asyncio.sleep(0)
    clock.running.set()
    await stalled
    kinds = [type(answer) for answer in await answers]
    assert kinds == [type(None), UnreadableValue, UnreadableValue, InvalidRequest, InvalidRequest, type(None)]
    assert {"dedup:default:lucky_box:1", "dedup:default:lucky_box:4"} <= set(rows(path))


async def test_callers_of_one_id_in_one_batch_have_one_winner(store: SqliteStore, clock: Clock) -> None:
    """Claims of one id within one batch are decided in the order of their arrival."""
    stalled = await clock.stall(store)
    claims = [a_claim("lucky_box:1", token=f"token-of-caller-{number:03}") for number in range(100)]
    answers = asyncio.gather(*(store.claim(claim, lasting(10)) for claim in claims))
    await asyncio.sleep(0)
    clock.running.set()
    await stalled
    assert await answers == [None] + [claims[0]] * 99


async def test_a_stalled_disk_does_not_hold_callers(path: Path, clock: Clock) -> None:
    """At the timeout a claim in progress is unknown; a waiting one was not applied and never will be."""
    store = SqliteStore(path, LAYOUT, clock_ms=clock, timeout_ms=100, idle_ms=1_000_000)
    await store.open()
    clock.running.clear()
    reads = clock.reads
    in_progress = asyncio.create_task(claim_to_end(store, claim_for("in progress")))
    await eventually(lambda: _later(clock.reads > reads))
    waiting = asyncio.create_task(claim_to_end(store, claim_for("waiting")))
    assert await unavailable(in_progress) == ("STORE_STALLED", Applied.UNKNOWN)
    assert await unavailable(waiting) == ("STORE_STALLED", Applied.NO)
    clock.running.set()
    await store.check()
    assert set(rows(path)) == {"dedup:default:lucky_box:in progress"}
    await store.close()


async def test_a_full_queue_refuses_at_once(path: Path, clock: Clock) -> None:
    """A call beyond the queue limit fails with STORE_QUEUE_FULL; those before it are answered, and so is a check."""
    store = SqliteStore(path, LAYOUT, timeout_ms=TIMEOUT_MS, clock_ms=clock, queue_limit=3)
    await store.open()
    stalled = await clock.stall(store)
    waiting = asyncio.gather(*(claim_to_end(store, claim_for(number)) for number in range(3)))
    await asyncio.sleep(0)
    refused = asyncio.create_task(claim_to_end(store, claim_for(3)))
    assert await unavailable(refused) == ("STORE_QUEUE_FULL", Applied.NO)
    check = asyncio.create_task(store.check())
    await asyncio.sleep(0)
    assert not check.done()
    clock.running.set()
    await check
    await stalled
    assert await waiting == [None] * 3
    assert len(rows(path)) == 3
    await store.close()


async def test_cancelled_callers_leave_the_store_in_order(store: SqliteStore, path: Path) -> None:
    """Callers cancelled at any moment affect no other call, and leave no message in the log of the loop."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    random_ = random.Random(20251128)

    async def one(number: int) -> bool:
        claim = claim_for(number)
        assert await claim_to_end(store, claim) is None
        return await store.get("default", claim.transaction_id) == claim

    answers: list[object] = []
    for batch in range(20):
        tasks = [asyncio.create_task(one(100 * batch + number)) for number in range(100)]
        for task in random_.sample(tasks, 50):
            if random_.random() < 0.05:
                await asyncio.sleep(random_.choice([0, 0, 0.0005, 0.002]))
            task.cancel()
        answers += await asyncio.gather(*tasks, return_exceptions=True)
    gone = sum(isinstance(answer, asyncio.CancelledError) for answer in answers)
    assert gone > 100
    assert sum(answer is True for answer in answers) == 2_000 - gone
    assert len(rows(path)) >= 2_000 - gone
    await store.check()
    assert not complaints


async def test_a_cancelled_call_that_still_waited_makes_no_claim(store: SqliteStore, path: Path, clock: Clock) -> None:
    """A claim whose caller is cancelled before its batch is not stored."""
    stalled = await clock.stall(store)
    call = asyncio.create_task(claim_to_end(store, claim_for(1)))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.sleep(0)
    clock.running.set()
    await stalled
    await store.check()
    assert not rows(path)


async def test_close_answers_what_is_queued(store: SqliteStore, path: Path, clock: Clock) -> None:
    """`close` carries out waiting calls first, refuses later ones, and may be called again."""
    stalled = await clock.stall(store)
    count = 2 * MAX_BATCH + 1
    queued = asyncio.gather(*(claim_to_end(store, claim_for(number)) for number in range(count)))
    await asyncio.sleep(0)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    assert await unavailable(asyncio.create_task(store.check())) == ("STORE_CLOSED", Applied.NO)
    clock.running.set()
    await closing
    await stalled
    assert await queued == [None] * count
    assert len(rows(path)) == count
    await store.close()


async def test_close_is_bounded(path: Path, clock: Clock) -> None:
    """With a stalled disk `close` and every call end at the timeout."""
    store = SqliteStore(path, LAYOUT, clock_ms=clock, timeout_ms=200)
    await store.open()
    clock.running.clear()
    reads = clock.reads
    calls = [asyncio.create_task(claim_to_end(store, claim_for(number))) for number in range(2)]
    await eventually(lambda: _later(clock.reads > reads))
    await asyncio.wait_for(store.close(), 10)
    reasons = [await unavailable(call) for call in calls]
    assert {reason for reason, _ in reasons} <= {"STORE_CLOSED", "STORE_STALLED"}
    thread = threading.enumerate()
    clock.running.set()
    wait_until(lambda: not any(one.name == "dedup-sqlite" and one.is_alive() for one in thread))


async def test_a_closed_store_can_be_opened_again(store: SqliteStore) -> None:
    """A reopened store still holds its claims."""
    await claim_to_end(store, claim_for(1))
    await store.close()
    await store.open()
    assert await store.get("default", "lucky_box:1")


async def test_a_removed_file_is_noticed(store: SqliteStore, path: Path) -> None:
    """A claim is not stored in a file that was removed; the next one is stored in a new file at the path."""
    await claim_to_end(store, claim_for(1))
    for name in path.parent.iterdir():
        name.unlink()
    call = asyncio.create_task(claim_to_end(store, claim_for(2)))
    assert await unavailable(call) == ("STORE_FILE_REPLACED", Applied.NO)
    assert await claim_to_end(store, claim_for(3)) is None
    assert set(rows(path)) == {"dedup:default:lucky_box:3"}


def test_a_failed_commit_is_in_doubt_and_a_check_fails(path: Path) -> None:
    """If the log cannot grow, a claim fails as unknown, a check fails too, and both recover with the disk."""
    assert output_of(FILLS_THE_DISK, path) == ["STORE_IO_ERROR unknown", "STORE_IO_ERROR no", "True", "None"]


async def test_a_full_database_certainly_applied_nothing(path: Path) -> None:
    """A batch that fails before its commit is rolled back and not applied, and the file serves again."""
    file = sqlite_file.ClaimFile(path, system_clock_ms)
    future: asyncio.Future[bytes | Exception | None] = asyncio.get_running_loop().create_future()

    def keep(_: bytes | None, now_ms: int) -> tuple[bytes | None, tuple[bytes, int]]:
        return None, (b"value" * 100, now_ms + 1_000)

    batch = [Operation(future, 0.0, b"key %d" % number, keep, may_change=True) for number in range(500)]
    assert file.begin()
    file._execute("PRAGMA max_page_count = 10")
    file.carry_out(batch)
    failures = {(one.answer.reason, one.answer.applied) for one in batch if isinstance(one.answer, StoreUnavailable)}
    assert failures == {("STORE_FULL", Applied.NO)}
    assert not rows(path)
    assert file.begin()
    file.carry_out(batch)
    assert [one.answer for one in batch] == [None] * 500
    file.close()


async def test_the_log_is_copied_and_cut(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write-ahead log does not grow without limit."""
    monkeypatch.setattr(sqlite_file, "_WAL_BYTES", 100_000)
    store = SqliteStore(path, LAYOUT, timeout_ms=TIMEOUT_MS)
    await store.open()
    await asyncio.gather(*(store.claim(a_claim(f"{number}"), MINUTE) for number in range(1_000)))
    await eventually(lambda: _later(Path(f"{path}-wal").stat().st_size <= 100_000))
    await store.close()


@pytest.mark.parametrize("method", ["upkeep", "checkpoint", "begin", "carry_out"])
async def test_a_bug_in_the_thread_does_not_end_it(path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """After an unexpected exception the callers of its batch receive an error at once, and the store serves again.

    Protection: the thread outlives any exception of the file.
    """
    store = SqliteStore(path, LAYOUT, timeout_ms=TIMEOUT_MS, idle_ms=10)
    await store.open()
    failed = threading.Event()
    works = getattr(sqlite_file.ClaimFile, method)

    def fails_once(file: sqlite_file.ClaimFile, *arguments: object) -> object:
        if failed.is_set():
            return works(file, *arguments)
        failed.set()
        raise KeyError("hunter2")

    monkeypatch.setattr(sqlite_file.ClaimFile, method, fails_once)
    if method == "carry_out":
        call = asyncio.create_task(store.claim(a_claim("lucky_box:1"), MINUTE))
        assert await unavailable(call) == ("STORE_ERROR", Applied.UNKNOWN)
    elif method == "begin":
        assert await unavailable(asyncio.create_task(store.check())) == ("STORE_ERROR", Applied.NO)
    else:
        assert await store.claim(a_claim("lucky_box:1"), MINUTE) is None
    await eventually(lambda: _later(failed.is_set()))
    assert await store.claim(a_claim("lucky_box:2"), MINUTE) is None
    await store.close()


def test_a_loop_that_ends_before_the_store_ends_its_thread(path: Path) -> None:
    """A program that omits `close` leaves no thread."""
    before = set(threading.enumerate())
    store = SqliteStore(path, LAYOUT, timeout_ms=TIMEOUT_MS, idle_ms=10)
    asyncio.run(store.open())
    wait_until(lambda: set(threading.enumerate()) <= before)


async def test_the_description_says_where_and_for_whom(path: Path) -> None:
    """The description names the file and its reach."""
    assert SqliteStore(path, LAYOUT).description == f"sqlite file {path} (only this host sees its claims)"
