"""What is measured: the servers, and which workloads each of them gets."""

from pathlib import Path

from benchmarks.servers import Redis, Subject

# The name of redis-py without a service, among the servers of the report.
DIRECT = "Redis directly"
# What a claim is compared with where no service stands between.
DIRECT_CLIENT = "redis-py asyncio"
STORES = ("redis-tcp", "redis-unix", "sqlite")
NAIVE = ("setnx", "get-then-set")
# At more callers than these thousands of claims would be under way at once, which shows the queue and not the batch.
BATCH_CALLERS = 16

# What h2load can send, which repeats one body, and what takes fresh ids.
CONSTANT = ("noop", "hot", "retry")
FRESH = ("noop", "fresh", "batch")
WORKLOADS = {
    "noop": "no-op rpc",
    "hot": "claims of one hot id",
    "retry": "retries with one token",
    "fresh": "claims of fresh ids",
    "batch": "batches of 100 fresh ids",
    "set": "SET NX of fresh ids",
}


def store_url(store: str, redis: Redis, folder: Path, engine: str) -> str:
    """Return the URL of a store by its name in the report."""
    urls = {"redis-tcp": redis.tcp_url, "redis-unix": redis.unix_url, "sqlite": f"sqlite://{folder}/{engine}.db"}
    return urls[store]


def subjects(
    engines: list[str], stores: list[str], *, workers: int, redis: Redis, folder: Path, naive: bool
) -> list[Subject]:
    """Return every server of a run, each no-op before the services that are paired with it."""
    found = []
    for engine in engines:
        noop = ["-m", "benchmarks.noop_server", "--engine", engine]
        if workers > 1:
            noop += ["--reuse-port"]
        found.append(Subject(f"no-op, {engine}", engine, "none", ("noop",), tuple(noop), processes=workers))
        for store in stores:
            serve = ["-m", "dedup_service", "serve", "--engine", engine, "--log-level", "warning"]
            serve += ["--store-url", store_url(store, redis, folder, engine)]
            if workers > 1:
                serve += ["--workers", str(workers)]
            workloads = ("hot", "retry", "fresh", "batch")
            found.append(Subject(f"service, {engine}, {store}", engine, store, workloads, tuple(serve)))
    if naive:
        for variant in NAIVE:
            peer = ("-m", "benchmarks.naive_peer", "--variant", variant, "--redis", redis.tcp_url)
            found.append(Subject(f"naive peer, {variant}", "grpcio", "redis-tcp", ("hot", "fresh"), peer))
    return found
