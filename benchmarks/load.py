"""The load generators: h2load for constant bodies, loadgen in Go for fresh ids, and Redis asked directly."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results import Load
from benchmarks.servers import CannotMeasure

# As many as a few callers with a channel each have; all calls in flight are shared among them.
MAX_CONNECTIONS = 8
BATCH = 100
_TIMEOUT_S = 60
_LOADGEN = Path(__file__).parent / "loadgen"
_HEADERS = ("content-type: application/grpc", "te: trailers", "grpc-timeout: 5S")
# What precedes a message on the wire of gRPC: whether it is compressed, and its length.
_PREFIX_BYTES = 5


def frame(message: bytes) -> bytes:
    """Return the message as gRPC puts it on the wire, uncompressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def parse_h2load(output: str, log: str, *, answer_bytes: int, concurrency: int) -> Load:
    """Return what h2load saw, from its output and its log of requests; raise CannotMeasure when it is not understood.

    h2load sees HTTP, where a gRPC call that failed is a 200 as well. But such a reply has no body, and an answer of
    another outcome has one of another length. So every answer was as long as the one that is expected, and a call
    failed or was answered otherwise, when the bytes of all bodies say so. Replies under way when the time was up add at
    most as many answers as there are callers.
    """
    counts = re.search(r"requests: .* (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored", output)
    data = re.search(r"traffic: .*\((\d+)\) data", output)
    if counts is None or data is None:
        raise CannotMeasure(f"h2load printed something else than expected:\n{output}")
    done, succeeded = int(counts[1]), int(counts[2])
    rows = [(int(start), int(took)) for start, status, took in _log_rows(log) if status == "200"]
    if not rows or len(rows) != succeeded:
        raise CannotMeasure(f"h2load logged {len(rows)} answers, and printed this:\n{output}")
    elapsed_us = max(start + took for start, took in rows) - min(start for start, _ in rows)
    answer = _PREFIX_BYTES + answer_bytes
    expected = done * answer
    wrong = 0 if expected <= int(data[1]) <= expected + concurrency * answer else done
    first_bad = f"{int(data[1])} bytes of answers instead of {expected}" if wrong else ""
    return Load(elapsed_us / 1e6, sorted(took for _, took in rows), wrong, done - succeeded, first_bad)


def _log_rows(log: str) -> list[list[str]]:
    return [line.split("\t")[:3] for line in log.splitlines()]


@dataclass(frozen=True)
class ConstantAnswer:
    """What every call of one h2load run sends, and how many bytes each answer to it should have."""

    message: bytes
    answer_bytes: int


class H2load:
    """Sends one body over and over."""

    name = "h2load"

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("h2load")
        if binary is None:
            raise CannotMeasure("h2load is not on PATH: `apt-get install nghttp2-client` on Debian")
        self._binary = binary
        self._folder = folder

    def run(self, target: str, method: str, constant: ConstantAnswer, *, concurrency: int, seconds: float) -> Load:
        """Call for a while, and return what was seen."""
        body, log = self._folder / "body", self._folder / "h2load.log"
        body.write_bytes(frame(constant.message))
        # h2load appends.
        log.unlink(missing_ok=True)
        connections = min(concurrency, MAX_CONNECTIONS)
        command = [self._binary, "-t", "1", "-c", str(connections), "-m", str(concurrency // connections)]
        command += ["-D", f"{int(seconds * 1_000)}ms", "-d", str(body), "--log-file", str(log)]
        for header in _HEADERS:
            command += ["-H", header]
        output = _run([*command, f"http://{target}{method}"])
        return parse_h2load(output, log.read_text(), answer_bytes=constant.answer_bytes, concurrency=concurrency)


class Loadgen:
    """Sends a fresh id with each claim, and checks every answer."""

    name = "loadgen"

    def __init__(self, binary: Path) -> None:
        self._binary = binary

    def run(self, target: str, mode: str, run: str, *, concurrency: int, seconds: float) -> Load:
        """Call for a while, and return what was seen; no other run may have had the same name."""
        connections = min(concurrency, MAX_CONNECTIONS)
        options = {"target": target, "mode": mode, "run": run, "concurrency": concurrency}
        options |= {"connections": connections, "seconds": seconds, "batch": BATCH}
        found = json.loads(_run([str(self._binary), *(f"-{name}={value}" for name, value in options.items())]))
        if not found["latencies_us"]:
            raise CannotMeasure(f"loadgen was answered nothing by {target}: {found['failed']}")
        failed = "; ".join(f"{count} x {status}" for status, count in found["failed"].items())
        bad = found.get("first_bad") or failed
        return Load(found["seconds"], found["latencies_us"], found["wrong"], sum(found["failed"].values()), bad)


def build_loadgen(folder: Path) -> Loadgen | None:
    """Compile loadgen, or return None without Go; raise CannotMeasure when it does not compile."""
    go = shutil.which("go")
    if go is None:
        return None
    binary = folder / "loadgen"
    built = subprocess.run(
        [go, "build", "-o", str(binary), "."], cwd=_LOADGEN, capture_output=True, text=True, check=False
    )
    if built.returncode:
        raise CannotMeasure(f"benchmarks/loadgen does not compile:\n{built.stderr}")
    return Loadgen(binary)


def direct(client: str, url: str, prefix: str, *, concurrency: int, seconds: float) -> tuple[Load, float]:
    """Claim by redis-py itself, in a process of its own; return what it saw, and the CPU seconds it took."""
    command = [sys.executable, "-m", "benchmarks.direct", "--client", client, "--redis", url, "--prefix", prefix]
    output = _run([*command, "--seconds", str(seconds), "--concurrency", str(concurrency)])
    found = json.loads(output)
    return Load(found["seconds"], found["latencies_us"], found["wrong"]), found["cpu_s"]


def redis_benchmark(port: int, *, concurrency: int, calls: int) -> float | None:
    """Return the `SET NX GET PX` a second of redis-benchmark, Redis' own client in C; None where it is missing."""
    binary = shutil.which("redis-benchmark")
    if binary is None:
        return None
    command = [binary, "-p", str(port), "-c", str(concurrency), "-n", str(calls), "-r", "1000000000", "--csv"]
    output = _run([*command, "SET", "redis-benchmark:__rand_int__", "1", "NX", "GET", "PX", "60000"])
    return float(next(csv.DictReader(io.StringIO(output)))["rps"])


def _run(command: Sequence[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if ended.returncode:
        raise CannotMeasure(f"`{' '.join(command)}` ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return ended.stdout
