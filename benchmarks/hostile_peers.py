"""Measures what each attack of tests/support/attacks.py costs each engine, while it lasts, and how others fare.

Every attack gets a server of its own with the embedded store, so that what one costs is not what another left behind.
Of each it says what the server answered, its CPU time, its resident memory before, during and after (Linux only), and
how long a claim of somebody else took while the attack was on.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import grpc

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
    return int(Path(f"/proc/{service.pid}/status").read_text().split("VmRSS:")[1].split()[0]) // 1024


def cpu_s(service: ServiceProcess) -> float:
    """Return the CPU time of a service so far."""
    fields = Path(f"/proc/{service.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def claim_ms(service: ServiceProcess) -> float | str:
    """Return how long a claim over a new connection takes, or the code with which it failed."""
    begun = time.perf_counter()
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        try:
            stub.ClaimTransaction(dedup_pb2.ClaimTransactionRequest(transaction_id=os.urandom(8).hex()), timeout=60)
        except grpc.RpcError as error:
            return str(error.code().name)
    return round((time.perf_counter() - begun) * 1000, 1)


def measure(engine: EngineName, name: str, size: int) -> dict[str, Any]:
    """Return what one attack costs a fresh server."""
    with tempfile.TemporaryDirectory() as folder:
        service = ServiceProcess("--engine", engine, "--store-url", f"sqlite://{folder}/claims.db").start()
        try:
            claim_ms(service)
            before, cpu = memory_mib(service), cpu_s(service)
            with ATTACKS[name](service.target, size) as said:
                during = memory_mib(service)
                waited = claim_ms(service)
                cpu = cpu_s(service) - cpu
            return {
                "engine": engine,
                "attack": name,
                "size": size,
                "answers": dict(said),
                "cpu_s": round(cpu, 2),
                "memory_mib": [before, during, memory_mib(service)],
                "claim_during_ms": waited,
                "claim_after_ms": claim_ms(service),
                "exit_code": service.stop(),
            }
        finally:
            service.kill()


def say(line: str) -> None:
    """Print a line at once, as the progress of what takes minutes."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Attack each engine in every way, or in those that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", action="append", choices=list(ATTACKS), help="only this one; may be repeated")
    parser.add_argument("--scale", type=float, default=1, help="how much of the usual sizes (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        parser.error("memory and CPU time of another process are read from /proc, which only Linux has")
    for name in arguments.attack or ATTACKS:
        for engine in get_args(EngineName):
            found = measure(engine, name, max(1, int(SIZES[name] * arguments.scale)))
            if arguments.json:
                say(json.dumps(found))
                continue
            before, during, after = found["memory_mib"]
            say(
                f"{name} x {found['size']}, {engine}: {before} -> {during} -> {after} MiB, {found['cpu_s']} s of CPU, "
                f"a claim meanwhile {found['claim_during_ms']} ms, answers {found['answers']}"
            )


if __name__ == "__main__":
    main()
