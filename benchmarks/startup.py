"""Measures the time from the service's start until its health is SERVING, and its idle memory.

Per store, the base is a fresh interpreter that only imports grpc, protobuf and the driver, in interleaved, paired
rounds. A socket polls until the service listens, then a channel asks for its health: a refused channel's reconnect
backoff is too long. Linux only.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import machine, publishing
from benchmarks.publishing import number, say, table, with_range
from benchmarks.results import paired_ratios, spread
from benchmarks.servers import START_TIMEOUT_S, CannotMeasure, free_port, running_redis

GOAL = 1.2
BARE = {
    "redis": "import grpc, google.protobuf.message; import redis.asyncio, hiredis",
    "sqlite": "import grpc, google.protobuf.message; import sqlite3",
}
_IDLE_S = 2.0
_POLL_S = 0.001


def bare_import(store: str) -> float:
    """Return the milliseconds of a fresh interpreter that imports the store's libraries."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"{BARE[store]}; import os; os._exit(0)"], check=True)
    return (time.perf_counter() - begun) * 1_000


def start(url: str, log: Path, idle_s: float) -> tuple[float, int]:
    """Return milliseconds until health is SERVING, and peak resident KiB after `idle_s` seconds.

    Raises CannotMeasure if the service exits, or does not serve in time.
    """
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DEDUP_")}
    command = [sys.executable, "-m", "dedup_service", "serve", "--listen", f"127.0.0.1:{port}", "--store-url", url]
    begun = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=clean)
    try:
        _await_serving(port, process, log)
        took_ms = (time.perf_counter() - begun) * 1_000
        time.sleep(idle_s)
        return took_ms, machine.peak_kib(process.pid)
    finally:
        process.terminate()
        process.wait()


def _await_serving(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise CannotMeasure(f"the service exited at start:\n{log.read_text()}")
        with socket.socket() as probe:
            listens = probe.connect_ex(("127.0.0.1", port)) == 0
        if listens and _is_serving(port):
            return
        time.sleep(_POLL_S)
    raise CannotMeasure(f"the service did not serve within {START_TIMEOUT_S:.0f} s:\n{log.read_text()}")


def _is_serving(port: int) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def measure(rounds: int, idle_s: float, stores: Sequence[str]) -> dict[str, Any]:
    """Return the figures of every store by round."""
    found: dict[str, dict[str, list[float]]] = {
        store: {"bare_ms": [], "serving_ms": [], "peak_kib": []} for store in stores
    }
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as name, running_redis(Path(name)) as redis:
        urls = {"redis": redis.tcp_url, "sqlite": f"sqlite://{name}/claims.db"}
        for store in stores:
            # Warms up the page cache and creates the claim file.
            bare_import(store)
            start(urls[store], Path(name) / "log", 0)
        for done in range(rounds):
            for store in stores:
                figures = found[store]
                figures["bare_ms"].append(bare_import(store))
                serving_ms, peak_kib = start(urls[store], Path(name) / "log", idle_s)
                figures["serving_ms"].append(serving_ms)
                figures["peak_kib"].append(peak_kib)
                say(f"round {done + 1} of {rounds}, {store}: SERVING after {serving_ms:.0f} ms")
    return {"machine": machine.describe(), "goal": GOAL, "bare": BARE, "stores": found}


def markdown(results: dict[str, Any]) -> str:
    """Return the table for the documentation."""
    rows = []
    for store, figures in results["stores"].items():
        ratio = with_range(paired_ratios(figures["serving_ms"], figures["bare_ms"]))
        times = [number(spread(figures[key]).median) for key in ("bare_ms", "serving_ms")]
        rows.append([store, *times, ratio, number(spread(figures["peak_kib"]).median / 1_024)])
    return table(["store", "bare import, ms", "start to SERVING, ms", "ratio", "peak of an idle sidecar, MiB"], rows)


def main() -> None:
    """Publish the figures."""
    chosen = publishing.options(__doc__)
    try:
        results = publishing.earlier(chosen) or measure(*((1, 0.2) if chosen.quick else (15, _IDLE_S)), tuple(BARE))
    except CannotMeasure as error:
        sys.exit(f"startup: {error}")
    publishing.publish("startup", results, markdown(results), chosen)


if __name__ == "__main__":
    main()
