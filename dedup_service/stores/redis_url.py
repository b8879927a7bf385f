"""What a Redis URL may say. Query arguments come from a short list: the driver lets them override its retries."""

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

SCHEMES = ("redis", "rediss", "unix")

_DEFAULT_PORT = 6379
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


@dataclass(frozen=True, slots=True)
class RedisTarget:
    """One Redis server: TCP when `socket_path` is empty, with TLS when `tls` is set."""

    host: str = ""
    port: int = _DEFAULT_PORT
    socket_path: str = ""
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    tls_files: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the URL without user name, password and query, for logs and people."""
        if self.socket_path:
            return f"unix://{self.socket_path}?db={self.db}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.db}"


def parse_redis_url(url: str) -> RedisTarget:
    """Return the server that `redis://`, `rediss://` or `unix://` URL names.

    Accepted are `redis[s]://[user[:password]@]host[:port][/db]` and `unix://[user[:password]@]/path[?db=n]`, and with
    `rediss` the query arguments ssl_ca_certs, ssl_certfile and ssl_keyfile, each a path. Raises ValueError with a
    sentence that never repeats the URL, which may hold a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORT
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError as error:
        raise ValueError(f"the store URL cannot be read: {error}") from None
    if parts.scheme not in SCHEMES:
        raise ValueError(f"the store URL must begin with one of {', '.join(f'{s}://' for s in SCHEMES)}")
    if parts.fragment:
        raise ValueError("the store URL has a '#': write %23 where it belongs to a user name or password")
    allowed = {"unix": ("db",), "redis": (), "rediss": _TLS_FILES}[parts.scheme]
    if unknown := sorted(set(query) - set(allowed)):
        raise ValueError(
            f"the store URL has the query argument {unknown[0]!r}: "
            f"{parts.scheme}:// takes {', '.join(allowed) if allowed else 'none'}"
        )
    if parts.scheme == "unix":
        if parts.hostname or not parts.path.strip("/"):
            raise ValueError(
                "a unix:// store URL names no host, and an absolute path: unix:///run/redis/redis.sock?db=0"
            )
        return RedisTarget(
            socket_path=unquote(parts.path),
            db=_database(query.get("db", "")),
            username=_credential(parts.username),
            password=_credential(parts.password),
        )
    return _tcp_target(parts, port, query)


def _tcp_target(parts: SplitResult, port: int, query: dict[str, str]) -> RedisTarget:
    if not parts.hostname:
        raise ValueError("the store URL names no host: write redis://host:6379/0")
    for name, path in query.items():
        if not Path(path).is_file():
            raise ValueError(f"the store URL names {path!r} as {name}, which is no file")
    return RedisTarget(
        host=unquote(parts.hostname),
        port=port,
        db=_database(parts.path.removeprefix("/")),
        username=_credential(parts.username),
        password=_credential(parts.password),
        tls=parts.scheme == "rediss",
        tls_files=query,
    )


def _credential(quoted: str | None) -> str:
    return unquote(quoted or "")


def _database(text: str) -> int:
    if not text:
        return 0
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"the store URL names the database {text!r}: write a number, such as redis://host:6379/0")
    return int(text)
