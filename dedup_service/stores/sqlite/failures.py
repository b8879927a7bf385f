"""What SQLite's and the system's error codes mean for callers."""

import errno
import sqlite3

from dedup_service.claims import Reason

# Primary result codes of SQLite: the stable reason, and what it means.
FAILURES = {
    sqlite3.SQLITE_BUSY: (Reason.STORE_BUSY, "another process holds its lock"),
    sqlite3.SQLITE_LOCKED: (Reason.STORE_BUSY, "another process holds its lock"),
    sqlite3.SQLITE_NOMEM: (Reason.STORE_OUT_OF_MEMORY, "there is not enough memory"),
    sqlite3.SQLITE_READONLY: (
        Reason.STORE_READ_ONLY,
        "it cannot be written: check its owner, its mode and its file system",
    ),
    sqlite3.SQLITE_IOERR: (Reason.STORE_IO_ERROR, "the disk failed: check the system log"),
    sqlite3.SQLITE_CORRUPT: (Reason.STORE_CORRUPT, "it is damaged: move it away, and check the disk"),
    sqlite3.SQLITE_NOTADB: (Reason.STORE_CORRUPT, "it is not a SQLite database: choose another path"),
    sqlite3.SQLITE_FULL: (Reason.STORE_FULL, "the disk is full: make room"),
    sqlite3.SQLITE_CANTOPEN: (Reason.STORE_CANNOT_OPEN, "it cannot be opened: check its folder"),
}
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

# What waiting does not mend when it is met while connecting.
FINAL_CODES = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
FINAL_ERRNOS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


def code_of(error: Exception) -> int:
    """Return SQLite's primary result code, 0 for any other error."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
