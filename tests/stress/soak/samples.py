"""The resource use of a service at one moment, from Linux and Redis."""

from dataclasses import dataclass
from pathlib import Path

import redis

from tests.support.processes import ServiceProcess
from tests.support.scrapes import scraped_text


@dataclass(frozen=True)
class Sample:
    """Resource use after `calls` calls."""

    seconds: float
    calls: int
    rss_bytes: int
    file_descriptors: int
    threads: int
    redis_connections: int | None
    """None while Redis is down."""


def take_sample(service: ServiceProcess, client: redis.Redis, seconds: float, calls: int) -> Sample:
    """Return a sample. Linux only. Also scrapes the metrics, as operators do."""
    scraped_text(service)
    process = Path(f"/proc/{service.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Sample(
        seconds=round(seconds, 1),
        calls=calls,
        rss_bytes=int(status["VmRSS"].split()[0]) * 1024,
        file_descriptors=sum(1 for _ in (process / "fd").iterdir()),
        threads=int(status["Threads"]),
        redis_connections=_connections(client),
    )


def _connections(client: redis.Redis) -> int | None:
    try:
        # Without this client's own connection.
        return len(client.client_list()) - 1
    except redis.RedisError:
        return None
