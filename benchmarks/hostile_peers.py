"""Measures the cost of each attack of tests/support/attacks.py on each engine, and its effect on others.

Each attack has its own server with the embedded store. The output has the server's answers, CPU time, and resident
memory before, during and after, and the latency of another caller's claim meanwhile. Linux only.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from typing import Any, get_args

import grpc

from benchmarks import machine
from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.config.settings import EngineName
from tests.support.attacks import ATTACKS
from tests.support.processes import ServiceProcess

SIZES = {
    "rapid_reset": 100_000,
    "made_you_reset": 50_000,
    "pings": 400_000,
    "settings": 600_000,
    "empty_data": 600_000,
    "continuations": 20_000,
    "header_bomb": 200,
    "a_message_too_long": 20_000,
    "streams_that_never_end": 10_000,
    "too_many_streams": 10_000,
    "slow_readers": 2_000,
    "half_open": 900,
    "hang_ups": 5_000,
}


def memory_mib(service: ServiceProcess) -> int:
    """Return the resident memory of a service."""
    return machine.rss_kib(service.pid) // 1024


def claim_ms(service: ServiceProcess) -> float | str:
    """Return a new connection's claim latency, or the error code."""
    begun = time.perf_counter()
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        try:
            stub.ClaimTransaction(dedup_pb2.ClaimTransactionRequest(transaction_id=os.urandom(8).hex()), timeout=60)
        except grpc.RpcError as error:
            return str(error.code().name)
    return round((time.perf_counter() - begun) * 1000, 1)


def measure(engine: EngineName, name: str, size: int) -> dict[str, Any]:
    """Return the figures of an attack on a fresh server."""
    with tempfile.TemporaryDirectory() as folder:
        service = ServiceProcess("--engine", engine, "--store-url", f"sqlite://{folder}/claims.db").start()
        try:
            claim_ms(service)
            before, cpu = memory_mib(service), machine.cpu_s(service.pid)
            with ATTACKS[name](service.target, size) as answers:
                during = memory_mib(service)
                waited = claim_ms(service)
                cpu = machine.cpu_s(service.pid) - cpu
            return {
                "engine": engine,
                "attack": name,
                "size": size,
                "answers": dict(answers),
                "cpu_s": round(cpu, 2),
                "memory_mib": [before, during, memory_mib(service)],
                "claim_during_ms": waited,
                "claim_after_ms": claim_ms(service),
                "exit_code": service.stop(),
            }
        finally:
            service.kill()


def say(line: str) -> None:
    """Print a line at once: the run takes minutes."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Run all or the chosen attacks on each engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--attack", action="append", choices=list(ATTACKS), help="run only this attack; may be repeated"
    )
    parser.add_argument(
        "--scale", type=float, default=1, help="factor for the size of the attacks (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        parser.error("reads memory and CPU time from /proc: run it on Linux")
    for name in arguments.attack or ATTACKS:
        for engine in get_args(EngineName):
            found = measure(engine, name, max(1, int(SIZES[name] * arguments.scale)))
            if arguments.json:
                say(json.dumps(found))
                continue
            before, during, after = found["memory_mib"]
            say(
                f"{name} x {found['size']}, {engine}: {before} -> {during} -> {after} MiB, {found['cpu_s']} s of CPU, "
                f"another claim {found['claim_during_ms']} ms, answers {found['answers']}"
            )


if __name__ == "__main__":
    main()
