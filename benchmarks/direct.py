"""Claims fresh keys in Redis with redis-py, without a service; prints one JSON object like loadgen.

`sync` calls sequentially on one connection. `asyncio` has a connection for each caller.
"""

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field

import redis
import redis.asyncio
import uvloop

TTL_MS = 60_000


@dataclass
class Measurements:
    """The measurements of all callers. The clocks start once connected."""

    latencies_us: list[int] = field(default_factory=list)
    wrong: int = 0
    seconds: float = field(default_factory=lambda: -time.perf_counter())
    cpu_s: float = field(default_factory=lambda: -time.process_time())

    def record(self, begun: float, *, claimed: object) -> None:
        """Record an answer; wrong unless claimed."""
        self.latencies_us.append(int((time.perf_counter() - begun) * 1e6))
        self.wrong += not claimed

    def stop(self) -> "Measurements":
        """Stop the clocks."""
        self.seconds += time.perf_counter()
        self.cpu_s += time.process_time()
        self.latencies_us.sort()
        return self


def sync(url: str, prefix: str, seconds: float) -> Measurements:
    """Claim on one connection."""
    with redis.Redis.from_url(url) as client:
        client.ping()
        seen, count = Measurements(), 0
        end = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < end:
            count += 1
            seen.record(begun, claimed=client.set(f"{prefix}:{count}", "1", nx=True, px=TTL_MS))
        return seen.stop()


async def pooled(url: str, prefix: str, seconds: float, concurrency: int) -> Measurements:
    """Claim with concurrent callers."""
    async with redis.asyncio.Redis.from_url(url, max_connections=concurrency) as client:
        await asyncio.gather(*(client.ping() for _ in range(concurrency)))
        seen = Measurements()
        end = time.perf_counter() + seconds

        async def caller(number: int) -> None:
            count = 0
            while (begun := time.perf_counter()) < end:
                count += 1
                claimed = await client.set(f"{prefix}:{number}:{count}", "1", nx=True, px=TTL_MS)
                seen.record(begun, claimed=claimed)

        await asyncio.gather(*map(caller, range(concurrency)))
        return seen.stop()


def main() -> None:
    """Print the measurements of a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--client", choices=("sync", "asyncio"), required=True)
    parser.add_argument("--redis", required=True, help="URL")
    parser.add_argument("--prefix", required=True, help="prefix of the keys")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--concurrency", type=int, default=1)
    options = parser.parse_args()
    if options.client == "sync":
        seen = sync(options.redis, options.prefix, options.seconds)
    else:
        seen = uvloop.run(pooled(options.redis, options.prefix, options.seconds, options.concurrency))
    sys.stdout.write(json.dumps(asdict(seen)) + "\n")


if __name__ == "__main__":
    main()
