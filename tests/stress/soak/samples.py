"""What a service takes of its machine at one moment, as Linux and Redis say it."""

from dataclasses import dataclass
from pathlib import Path

import redis

from tests.support.processes import ServiceProcess
from tests.support.scrapes import scraped_text


@dataclass(frozen=True)
class Sample:
    """One look at the service; `calls` is how many had been made by then."""

    seconds: float
    calls: int
    rss_bytes: int
    file_descriptors: int
    threads: int
    redis_connections: int | None
    """None while Redis is away."""


def look(service: ServiceProcess, client: redis.Redis, seconds: float, calls: int) -> Sample:
    """Return a sample of a service that runs, on Linux; its metrics are read as well, since operators do."""
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
        # One of them is the connection that asks.
        return len(client.client_list()) - 1
    except redis.RedisError:
        return None
