"""Parses Redis URLs. Only listed query arguments are allowed: others could turn on redis-py's retries.

No error repeats a part that may belong to a password, such as text after an unescaped `/`.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl, unquote

SCHEMES = ("redis", "rediss", "unix")
SENTINEL_SCHEMES = ("redis+sentinel", "rediss+sentinel")
CLUSTER_SCHEMES = ("redis+cluster", "rediss+cluster")

_DEFAULT_PORT = 6379
_DEFAULT_SENTINEL_PORT = 26379
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SENTINEL_CREDENTIALS = ("sentinel_username", "sentinel_password")
_ARGUMENTS = {
    "unix": ("db",),
    "redis": (),
    "rediss": _TLS_FILES,
    "redis+sentinel": _SENTINEL_CREDENTIALS,
    "rediss+sentinel": (*_SENTINEL_CREDENTIALS, *_TLS_FILES),
    "redis+cluster": (),
    "rediss+cluster": _TLS_FILES,
}

# An IPv6 address in brackets, or a name; optionally a port.
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:@,]+))(?::([0-9]*))?")
# The names Sentinel allows.
_MASTER_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class RedisTarget:
    """One Redis server: TCP if `socket_path` is empty, with TLS if `tls` is set."""

    host: str = ""
    port: int = _DEFAULT_PORT
    socket_path: str = ""
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    tls_files: dict[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        """Return the URL without user name, password and query."""
        if self.socket_path:
            return f"unix://{self.socket_path}?db={self.db}"
        return f"{'rediss' if self.tls else 'redis'}://{self.address}/{self.db}"

    @property
    def address(self) -> str:
        """Host and port, for people."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class SentinelTarget:
    """A master's name at its Sentinels. `server` is the master without host and port."""

    sentinels: tuple[RedisTarget, ...]
    master_name: str
    server: RedisTarget

    def __str__(self) -> str:
        """Return the name and the Sentinels, without user names and passwords."""
        return f'"{self.master_name}" by Sentinel {",".join(sentinel.address for sentinel in self.sentinels)}'


@dataclass(frozen=True, slots=True)
class ClusterTarget:
    """Some nodes of a cluster; the others are discovered."""

    nodes: tuple[RedisTarget, ...]

    def __str__(self) -> str:
        """Return the nodes, without user names and passwords."""
        return f"by {','.join(node.address for node in self.nodes)}"


def parse_redis_url(url: str) -> RedisTarget:
    """Return the server that a `redis://`, `rediss://` or `unix://` URL names.

    The forms are `redis[s]://[user[:password]@]host[:port][/db]` and `unix://[user[:password]@]/path[?db=n]`; `rediss`
    takes the query arguments ssl_ca_certs, ssl_certfile and ssl_keyfile, each a path. Raises ValueError with a sentence
    that never repeats the URL, which may contain a password.
    """
    parts = _split(url, SCHEMES)
    if parts.scheme == "unix":
        if parts.hosts or not parts.path.strip("/"):
            raise ValueError(
                "a unix:// store URL names no host, and an absolute path: unix:///run/redis/redis.sock?db=0"
            )
        return replace(parts.credentials, socket_path=unquote(parts.path), db=_database(parts.arguments.get("db", "")))
    if not parts.hosts:
        raise ValueError("the store URL names no host: write redis://host:6379/0")
    host, port = _host(parts.hosts, _DEFAULT_PORT)
    return replace(
        parts.credentials,
        host=host,
        port=port,
        db=_database(parts.path.removeprefix("/")),
        tls=parts.scheme == "rediss",
        tls_files=_tls_files(parts.arguments),
    )


def parse_sentinel_url(url: str) -> SentinelTarget:
    """Return the Sentinels and master that a `redis+sentinel://` or `rediss+sentinel://` URL names.

    The form is `redis[s]+sentinel://[user[:password]@]host[:port][,host[:port]…]/master[/db]`, with the query arguments
    sentinel_username and sentinel_password; those of `parse_redis_url` with `rediss` apply to Sentinels and servers.
    Raises ValueError as `parse_redis_url` does.
    """
    parts = _split(url, SENTINEL_SCHEMES)
    if not parts.hosts:
        raise ValueError("the store URL names no Sentinel: write redis+sentinel://host1:26379,host2:26379/mymaster")
    master_name, _, database = parts.path.removeprefix("/").partition("/")
    if not _MASTER_NAME.fullmatch(unquote(master_name)):
        raise ValueError(
            "the store URL names no master after its Sentinels (letters, digits, '.', '_' and '-'): "
            "write redis+sentinel://host:26379/mymaster/0"
        )
    username, password = (parts.arguments.get(name, "") for name in _SENTINEL_CREDENTIALS)
    if username and not password:
        raise ValueError("the store URL has a sentinel_username without a sentinel_password")
    server = replace(
        parts.credentials,
        db=_database(database),
        tls=parts.scheme == "rediss+sentinel",
        tls_files=_tls_files(parts.arguments),
    )
    sentinel = replace(server, db=0, username=username, password=password)
    addresses = [_host(text, _DEFAULT_SENTINEL_PORT) for text in parts.hosts.split(",")]
    return SentinelTarget(
        tuple(replace(sentinel, host=host, port=port) for host, port in addresses), unquote(master_name), server
    )


def parse_cluster_url(url: str) -> ClusterTarget:
    """Return the nodes that a `redis+cluster://` or `rediss+cluster://` URL names.

    The form is `redis[s]+cluster://[user[:password]@]host[:port][,host[:port]…]`; `rediss` takes the query arguments of
    `parse_redis_url`. Raises ValueError as it does.
    """
    parts = _split(url, CLUSTER_SCHEMES)
    if not parts.hosts:
        raise ValueError("the store URL names no node: write redis+cluster://host1:6379,host2:6379")
    if parts.path.strip("/") not in {"", "0"}:
        raise ValueError("the store URL names a database after its nodes, and a Redis cluster has the database 0 alone")
    node = replace(parts.credentials, tls=parts.scheme == "rediss+cluster", tls_files=_tls_files(parts.arguments))
    addresses = dict.fromkeys(_host(text, _DEFAULT_PORT) for text in parts.hosts.split(","))
    return ClusterTarget(tuple(replace(node, host=host, port=port) for host, port in addresses))


@dataclass(frozen=True, slots=True)
class _Parts:
    scheme: str
    credentials: RedisTarget
    hosts: str
    path: str
    arguments: dict[str, str]


# Not urlsplit: it accepts one host only, and its errors repeat the port, which is the password in a URL without '@'.
def _split(url: str, schemes: tuple[str, ...]) -> _Parts:
    scheme, colon, rest = url.partition("://")
    if not colon or scheme not in schemes:
        raise ValueError(f"the store URL must begin with one of {', '.join(f'{s}://' for s in schemes)}")
    if not url.isprintable() or " " in url:
        raise ValueError("the store URL cannot be read: it has a space or a control character")
    if "#" in rest:
        raise ValueError("the store URL has a '#': write %23 where it belongs to a user name or password")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    if (scheme != "unix" and "@" in path) or "@" in query:
        raise ValueError("the store URL has an '@' after its host: write %2F, %3F and %40 for '/', '?' and '@'")
    userinfo, _, hosts = authority.rpartition("@")
    if "@" in userinfo:
        raise ValueError("the store URL has two '@': name user and password once, and write %40 for '@' in them")
    username, _, password = userinfo.partition(":")
    credentials = RedisTarget(username=unquote(username), password=unquote(password))
    return _Parts(scheme, credentials, hosts, slash + path, _arguments(query, scheme))


def _arguments(query: str, scheme: str) -> dict[str, str]:
    try:
        # A '+' stays a '+', as in user name and password.
        pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ValueError("the store URL cannot be read: write its query as ?name=value&name=value") from None
    names = [name for name, _ in pairs]
    allowed = _ARGUMENTS[scheme]
    if unknown := sorted(set(names) - set(allowed)):
        raise ValueError(
            f"the store URL has the query argument {unknown[0]!r}: "
            f"{scheme}:// allows {', '.join(allowed) if allowed else 'none'}"
        )
    if len(set(names)) != len(names):
        raise ValueError("the store URL has a query argument twice")
    return dict(pairs)


def _host(text: str, default_port: int) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    port = int(found[3]) if found and found[3] else default_port
    if found is None or not 0 < port < 65536:
        raise ValueError(
            "the store URL cannot be read: write each host as host:port or [IPv6 address]:port, the port from 1 to "
            "65535, and '@' between a password and the host"
        )
    return unquote(found[1] or found[2]), port


def _tls_files(arguments: dict[str, str]) -> dict[str, str]:
    files = {name: path for name, path in arguments.items() if name in _TLS_FILES}
    for name, path in files.items():
        if not Path(path).is_file():
            raise ValueError(f"the store URL names {path!r} as {name}, which is not a file")
    return files


def _database(text: str) -> int:
    if not text:
        return 0
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"the store URL names the database {text!r}: write a number, such as redis://host:6379/0")
    return int(text)
