"""Claims in one SQLite file, for a single host. Only `file` imports sqlite3."""
