"""Claims in one SQLite file, for a single host. Only this folder imports sqlite3."""
