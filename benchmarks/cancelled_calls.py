"""Measures the memory a server leaks per cancelled call, compared with answered calls.

grpcio leaks the operations of a cancelled batch (grpc/grpc#43360). Each kind has its own server with the embedded
store. Resident memory is read between rounds, without in-flight calls. Linux only. A cancelled call waits as a
duplicate, so the server works on it.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc

from benchmarks import machine
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

CALLERS = 100
ROUNDS = 20
SEED = 20251128
START_TIMEOUT_S = 30
IDLE_S = 0.5

Stub = Any


def request(wait_s: int = 0) -> dedup_pb2.ClaimTransactionRequest:
    """Return a duplicate's claim."""
    claim = dedup_pb2.ClaimTransactionRequest(transaction_id="held")
    claim.ttl.FromSeconds(86_400)
    claim.wait.FromSeconds(wait_s)
    return claim


async def answered(stub: Stub, _: random.Random) -> None:
    """Make an answered call."""
    await stub.ClaimTransaction(request())


async def cancelled(stub: Stub, chance: random.Random) -> None:
    """Make a call that waits, and cancel it."""
    call = stub.ClaimTransaction(request(wait_s=60))
    asyncio.get_running_loop().call_later(chance.uniform(0.02, 0.1), call.cancel)
    try:
        await call
    except asyncio.CancelledError:
        return
    raise AssertionError("a waiting call was answered instead of cancelled")


KINDS = {"answered": answered, "cancelled": cancelled}


async def measure(kind: str, calls: int) -> dict[str, Any]:
    """Call a new server in one way, and return the figures."""
    chance = random.Random(SEED)  # noqa: S311 - seeds a benchmark
    a_round = max(1, calls // ROUNDS // CALLERS)
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as folder:
        target, log = f"unix://{folder}/grpc.sock", Path(folder) / "log"
        arguments = ("--listen", target, "--store-url", f"sqlite://{folder}/claims.db")
        clean = {key: value for key, value in os.environ.items() if not key.startswith("DEDUP_")}
        with log.open("wb") as output:
            server = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "dedup_service", "serve", *arguments), stderr=output, env=clean
            )
        try:
            async with grpc.aio.insecure_channel(target) as channel:
                await asyncio.wait_for(channel.channel_ready(), START_TIMEOUT_S)
                sizes = await _rounds(kind, dedup_pb2_grpc.DedupServiceStub(channel), chance, a_round, server.pid)
        finally:
            server.terminate()
            await server.wait()
        seen = log.read_text().count('"code": "CANCELLED"')
    done = a_round * CALLERS
    half = sizes[ROUNDS // 2 :]
    slope = statistics.linear_regression([done * number for number in range(len(half))], half).slope
    return {
        "calls": done * ROUNDS,
        "cancelled_as_the_server_saw_it": seen,
        "rss_kib": [size >> 10 for size in sizes],
        "bytes_a_call_in_the_second_half": round(slope, 1),
    }


async def _rounds(kind: str, stub: Stub, chance: random.Random, a_round: int, pid: int) -> list[int]:
    async def caller() -> None:
        for _ in range(a_round):
            await KINDS[kind](stub, chance)

    await stub.ClaimTransaction(request())
    sizes = []
    for number in range(ROUNDS):
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        await asyncio.sleep(IDLE_S)
        size_kib = machine.rss_kib(pid)
        sizes.append(size_kib * 1024)
        sys.stderr.write(f"{kind}: {(number + 1) * a_round * CALLERS} calls, {size_kib} KiB\n")
    return sizes


def main() -> None:
    """Measure both kinds of calls."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--calls", type=int, default=100_000, help="number of calls of each kind (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    figures: dict[str, Any] = {"grpcio": grpc.__version__, "python": sys.version.split()[0]}
    for kind in KINDS:
        figures[kind] = asyncio.run(measure(kind, options.calls))
    if options.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    sys.stdout.write(f"grpcio {figures['grpcio']}, Python {figures['python']}\n")
    for kind in KINDS:
        found = figures[kind]
        sys.stdout.write(
            f"{kind:>9}: {found['calls']} calls, {found['cancelled_as_the_server_saw_it']} cancelled according "
            f"to the server; {found['bytes_a_call_in_the_second_half']:+.1f} bytes a call in the second half; "
            f"{found['rss_kib'][0]} → {found['rss_kib'][ROUNDS // 2]} → {found['rss_kib'][-1]} KiB\n"
        )


if __name__ == "__main__":
    main()
