"""The embedded store's SQLite file: schema, batches and errors."""

import contextlib
import errno
import itertools
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dedup_service.claims import Applied, InvalidRequest, Reason, StoreRefused, StoreUnavailable, UnreadableValue
from dedup_service.stores.sqlite.thread import FORGET, Operation, Row

SCHEMA_VERSION = 1

# "DEDU" in ASCII.
APPLICATION_ID = 0x44454455

_SCHEMA = (
    # With a rowid, new claims are appended and the expiry index stays small. Measured up to twice as fast in large
    # batches, and never slower.
    "CREATE TABLE claims (key BLOB PRIMARY KEY NOT NULL, value BLOB NOT NULL, expire_time_ms INTEGER NOT NULL)",
    "CREATE INDEX claims_by_expiry ON claims (expire_time_ms)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

# Each statement releases the interpreter's lock, which a busy event loop keeps for 5 ms.
_ROWS = 64
# The plus sign keeps SQLite from searching by expiry.
_SELECT = "SELECT key, value FROM claims WHERE key IN ({}) AND +expire_time_ms > ?"
_SELECTS = [_SELECT.format(",".join("?" * count)) for count in range(_ROWS + 1)]
_INSERT = "INSERT OR REPLACE INTO claims VALUES {}"
_INSERTS = [_INSERT.format(",".join(["(?,?,?)"] * count)) for count in range(_ROWS + 1)]
_RECLAIM = "DELETE FROM claims WHERE rowid IN (SELECT rowid FROM claims WHERE expire_time_ms <= ? LIMIT ?)"

# Target duration of an idle upkeep step, which an arriving claim waits for. The fitting number of rows depends on the
# disk and the file's size, since claims that expire together lie on as many pages.
_STEP_S = 0.001
_FIRST_STEP_ROWS = 50
# Fewer rows hardly shorten a step, and leave a slow disk behind.
_MIN_STEP_ROWS = 32
_MAX_STEP_ROWS = 1_000

# Limit of the log under load: copying it takes 15 ms, and a page changes many times before.
_WAL_BYTES = 4 * 1024 * 1024
# Limit of the log when idle.
_IDLE_WAL_BYTES = 128 * 1024

_LOCKED = (Reason.STORE_BUSY, "another process holds its lock: wait, or end that process")
# Primary result codes of SQLite.
_FAILURES = {
    sqlite3.SQLITE_BUSY: _LOCKED,
    sqlite3.SQLITE_LOCKED: _LOCKED,
    sqlite3.SQLITE_NOMEM: (Reason.STORE_OUT_OF_MEMORY, "there is not enough memory: raise the limit of the process"),
    sqlite3.SQLITE_READONLY: (
        Reason.STORE_READ_ONLY,
        "it cannot be written: check its owner, its mode and its file system",
    ),
    sqlite3.SQLITE_IOERR: (Reason.STORE_IO_ERROR, "the disk failed: check the system log"),
    sqlite3.SQLITE_CORRUPT: (Reason.STORE_CORRUPT, "it is damaged: move it away, and check the disk"),
    sqlite3.SQLITE_NOTADB: (Reason.STORE_CORRUPT, "it is not a SQLite database: choose another path"),
    sqlite3.SQLITE_FULL: (Reason.STORE_FULL, "the disk is full: free some space"),
    sqlite3.SQLITE_CANTOPEN: (Reason.STORE_CANNOT_OPEN, "it cannot be opened: check its folder"),
}
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

# Errors on connecting that waiting does not repair.
_FINAL_CODES = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_FINAL_ERRNOS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class ClaimFile:
    """The file, driven by the thread. It reconnects after any failure, so that SQLite checks the file again."""

    def __init__(self, path: Path, clock_ms: Callable[[], int]) -> None:
        self.name = f"the sqlite file {path}"
        self._path = path
        self._wal_path = Path(f"{path}-wal")
        self._clock_ms = clock_ms
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._step_rows = _FIRST_STEP_ROWS

    def begin(self) -> bool:
        """Implement BatchFile."""
        connecting = self._connection is None
        try:
            if self._connection is None:
                self._connection = self._connect()
            self._check_identity()
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if _code_of(error) in _BUSY:
                return False
            self.close()
            failure = self._failure(error)
            if connecting and _code_of(error) in _FINAL_CODES:
                raise StoreRefused(str(failure)) from error
            raise failure from error
        except OSError as error:
            self.close()
            if error.errno in _FINAL_ERRNOS:
                raise StoreRefused(f"{self.name}: {error.strerror}: choose another path, or repair this one") from error
            reason = Reason.STORE_FULL if error.errno in _FULL_ERRNOS else Reason.STORE_IO_ERROR
            raise StoreUnavailable(
                reason, f"{self.name}: {error.strerror}: check the disk and the system log", Applied.NO
            ) from error
        except BaseException:
            self.close()
            raise
        return True

    def carry_out(self, operations: Sequence[Operation]) -> None:
        """Implement BatchFile."""
        committing = False
        try:
            # Read under the lock: waiting for it must neither shorten a claim nor revive an expired one.
            now_ms = self._clock_ms()
            held = self._held([one.key for one in operations if one.key is not None], now_ms)
            changes: dict[bytes, Row] = {}
            for one in operations:
                _carry_out(one, held, changes, now_ms)
            self._keep([(key, *row) for key, row in changes.items() if row is not FORGET])
            self._forget([key for key, row in changes.items() if row is FORGET])
            if changes:
                # Twice as many as arrive, to reduce a backlog under load.
                self._execute(_RECLAIM, (now_ms, 2 * len(changes)))
            if any(one.key is None for one in operations):
                # Write an unchanged value: only a write detects a full or read-only disk.
                self._execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            committing = True
            self._execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - every caller receives it, and the thread continues
            self.close()
            for one in operations:
                # A failed commit may have reached the disk; operations without writes were not applied.
                applied = Applied.UNKNOWN if committing and one.changed else Applied.NO
                one.answer = self._failure(error, applied) if isinstance(error, sqlite3.Error) else error

    def upkeep(self) -> bool:
        """Copy a grown log, or delete a few expired claims; return whether there may be more."""
        return self._shorten_log(_IDLE_WAL_BYTES) or self._reclaim()

    def checkpoint(self) -> None:
        """Copy a large log outside of any commit, so that no caller waits for it."""
        self._shorten_log(_WAL_BYTES, patience_ms=100)

    def _reclaim(self) -> bool:
        if self._connection is None:
            return False
        rows, begun = self._step_rows, time.perf_counter()
        try:
            now_ms = self._clock_ms()
            # Read first, so that an idle store takes no lock and writes nothing.
            if not self._execute("SELECT 1 FROM claims WHERE expire_time_ms <= ? LIMIT 1", (now_ms,)).fetchall():
                return False
            count = self._delete_expired(now_ms, rows)
        except Exception as error:  # noqa: BLE001 - a lasting fault shows in the next call
            if _code_of(error) not in _BUSY:
                self.close()
            return False
        if count == rows:
            fitting = int(rows * _STEP_S / (time.perf_counter() - begun))
            # Grow gradually, since one fast step proves little; shrink at once.
            self._step_rows = min(max(fitting, _MIN_STEP_ROWS), rows + rows // 4 + 1, _MAX_STEP_ROWS)
        return count == rows

    def _delete_expired(self, now_ms: int, rows: int) -> int:
        # Unsynced: an undone deletion is repeated, and the next claim syncs the whole log.
        self._execute("PRAGMA synchronous = NORMAL")
        try:
            self._execute("BEGIN IMMEDIATE")
            count = self._execute(_RECLAIM, (now_ms, rows)).rowcount
            self._execute("COMMIT")
        finally:
            self._execute("PRAGMA synchronous = FULL")
        return count

    def _shorten_log(self, limit: int, patience_ms: int = 0) -> bool:
        """Move a log above the limit into the database and truncate it; return whether that was done."""
        with contextlib.suppress(OSError):
            if self._connection is not None and self._wal_path.stat().st_size > limit:
                try:
                    # Truncating takes the write lock. SQLite before 3.51.3 can, very rarely, damage a database when one
                    # process restarts its log while another copies it; the lock makes that rarer.
                    self._execute(f"PRAGMA busy_timeout = {patience_ms}")
                    ((busy, _, _),) = self._execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                    self._execute("PRAGMA busy_timeout = 0")
                except sqlite3.Error:
                    self.close()
                    return False
                return not busy
        return False

    def close(self) -> None:
        """Roll back and disconnect; the next `begin` reconnects."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.rollback()
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _connect(self) -> sqlite3.Connection:
        self._make_file()
        connection = sqlite3.connect(self._path, timeout=0, isolation_level=None, cached_statements=4 * _ROWS)
        try:
            self._prepare(connection)
            self._identity = self._identify()
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # Write nothing before the file proves to be ours or empty.
        empty = self._recognise(connection)
        if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise StoreRefused(f"{self.name} is on a file system without shared memory: choose a local disk")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        if empty:
            connection.execute("BEGIN IMMEDIATE")
            # Another process may have created the schema.
            if self._recognise(connection):
                for statement in _SCHEMA:
                    connection.execute(statement)
            connection.execute("COMMIT")
        elif connection.execute("PRAGMA quick_check(1)").fetchall() != [("ok",)]:
            raise StoreRefused(f"{self.name} is damaged: move it away, and check the disk")

    def _make_file(self) -> None:
        for folder in reversed(self._path.parents):
            folder.mkdir(mode=0o700, exist_ok=True)
        if not self._path.exists():
            # Do not open an existing file: closing it would drop this process's locks on it.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        elif not self._path.is_file():
            raise StoreRefused(f"{self.name} is not a regular file: choose another path")
        # SQLite would open it for reading and fail at the first write. The log is beside it.
        if not (os.access(self._path, os.R_OK | os.W_OK) and os.access(self._path.parent, os.W_OK | os.X_OK)):
            raise StoreRefused(f"{self.name} or its folder may not be written by this process: change owner or mode")

    def _recognise(self, connection: sqlite3.Connection) -> bool:
        """Return whether the database is empty. Raises StoreRefused unless it is empty or ours."""
        ((application, version, objects),) = connection.execute(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)"
            " FROM pragma_application_id, pragma_user_version"
        ).fetchall()
        if (application, version, objects) == (0, 0, 0):
            return True
        if application != APPLICATION_ID:
            raise StoreRefused(f"{self.name} is the database of another application: choose another path")
        if version != SCHEMA_VERSION:
            raise StoreRefused(
                f"{self.name} has schema version {version} and this service knows {SCHEMA_VERSION}: "
                "upgrade this service, or choose another path"
            )
        return False

    def _identify(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return None
        return stat.st_dev, stat.st_ino

    def _check_identity(self) -> None:
        """Raise StoreUnavailable when the path no longer leads to the open file: other processes would use another."""
        if self._identify() != self._identity:
            raise StoreUnavailable(
                Reason.STORE_FILE_REPLACED,
                f"{self.name} was removed or replaced while it was open, and its claims are lost: restore it, or "
                "stop whatever replaces it",
                Applied.NO,
            )

    def _held(self, keys: list[bytes], now_ms: int) -> dict[bytes, bytes]:
        held: dict[bytes, bytes] = {}
        for at in range(0, len(keys), _ROWS):
            part = keys[at : at + _ROWS]
            held.update(self._execute(_SELECTS[len(part)], (*part, now_ms)).fetchall())
        return held

    def _keep(self, rows: list[tuple[bytes, bytes, int]]) -> None:
        for at in range(0, len(rows), _ROWS):
            part = rows[at : at + _ROWS]
            self._execute(_INSERTS[len(part)], tuple(itertools.chain.from_iterable(part)))

    def _forget(self, keys: list[bytes]) -> None:
        for key in keys:
            self._execute("DELETE FROM claims WHERE key = ?", (key,))

    def _execute(self, statement: str, parameters: Sequence[bytes | int] = ()) -> sqlite3.Cursor:
        if self._connection is None:
            raise sqlite3.ProgrammingError("there is no connection")
        return self._connection.execute(statement, parameters)

    def _failure(self, error: sqlite3.Error, applied: Applied = Applied.NO) -> StoreUnavailable:
        reason, meaning = _FAILURES.get(_code_of(error), (Reason.STORE_ERROR, str(error)))
        return StoreUnavailable(reason, f"{self.name}: {meaning}", applied)


def _code_of(error: Exception) -> int:
    """Return SQLite's primary result code, 0 for other errors."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _carry_out(operation: Operation, held: dict[bytes, bytes], changes: dict[bytes, Row], now_ms: int) -> None:
    """Set an operation's answer, and record its effect in `held` and `changes`."""
    operation.answer, operation.changed = None, False
    key, step = operation.key, operation.step
    if key is None or step is None:
        return
    try:
        operation.answer, row = step(held.get(key), now_ms)
    except (InvalidRequest, UnreadableValue) as error:
        operation.answer = error
        return
    if row is None:
        return
    operation.changed = True
    changes[key] = row
    if row is FORGET:
        held.pop(key, None)
    else:
        held[key] = row[0]
