"""The load: h2load for constant bodies, loadgen in Go for fresh ids, Redis directly; and checks of the answers."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.results import Load
from benchmarks.servers import CannotMeasure
from dedup.v1 import dedup_pb2, dedup_pb2_grpc

CLAIM_PATH = "/dedup.v1.DedupService/ClaimTransaction"
NOOP_PATH = "/dedup.benchmark.Noop/Call"

# As with a few callers; in-flight calls are distributed over them.
MAX_CONNECTIONS = 8
BATCH = 100
_TIMEOUT_S = 60
_CALL_TIMEOUT_S = 5.0
# Outlasts every measurement.
_HOT_TTL_S = 3_600
_TOKEN = "benchmark-token-of-one-caller"  # noqa: S105 - names an attempt
_RIVALS = 16
_CHECK_CONNECTIONS = 4
_LOADGEN = Path(__file__).parent / "loadgen"
_HEADERS = ("content-type: application/grpc", "te: trailers", "grpc-timeout: 5S")
# The gRPC frame header: compression flag and length.
_PREFIX_BYTES = 5


def frame(message: bytes) -> bytes:
    """Return the message in gRPC framing, uncompressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def parse_h2load(output: str, log: str, *, answer_bytes: int, concurrency: int) -> Load:
    """Return the measurements of h2load's output and request log. Raises CannotMeasure if unparsable.

    To h2load, a failed gRPC call is a 200, too, but its body is missing, and another outcome's has another length. So
    all answers count as wrong if the total body size does not match. Calls in flight at the end may add up to one
    answer per caller.
    """
    counts = re.search(r"requests: .* (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored", output)
    data = re.search(r"traffic: .*\((\d+)\) data", output)
    if counts is None or data is None:
        raise CannotMeasure(f"unexpected output of h2load:\n{output}")
    done, succeeded = int(counts[1]), int(counts[2])
    rows = [(int(start), int(took)) for start, status, took in _log_rows(log) if status == "200"]
    if not rows or len(rows) != succeeded:
        raise CannotMeasure(f"h2load logged {len(rows)} answers, but printed:\n{output}")
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
    """The message of every call of an h2load run, and each answer's expected size."""

    message: bytes
    answer_bytes: int


class H2load:
    """Sends the same body in every call."""

    name = "h2load"

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("h2load")
        if binary is None:
            raise CannotMeasure("h2load is not on PATH: `apt-get install nghttp2-client` on Debian")
        self._binary = binary
        self._folder = folder

    def run(self, target: str, method: str, constant: ConstantAnswer, *, concurrency: int, seconds: float) -> Load:
        """Call for `seconds`, and return the measurements."""
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
    """Claims a fresh id per call, and checks every answer."""

    name = "loadgen"

    def __init__(self, binary: Path) -> None:
        self._binary = binary

    def run(self, target: str, mode: str, run: str, *, concurrency: int, seconds: float) -> Load:
        """Call for `seconds`, and return the measurements. `run` must be unique."""
        connections = min(concurrency, MAX_CONNECTIONS)
        options = {"target": target, "mode": mode, "run": run, "concurrency": concurrency}
        options |= {"connections": connections, "seconds": seconds, "batch": BATCH}
        found = json.loads(_run([str(self._binary), *(f"-{name}={value}" for name, value in options.items())]))
        if not found["latencies_us"]:
            raise CannotMeasure(f"loadgen received no answer from {target}: {found['failed']}")
        failed = "; ".join(f"{count} x {status}" for status, count in found["failed"].items())
        bad = found.get("first_bad") or failed
        return Load(found["seconds"], found["latencies_us"], found["wrong"], sum(found["failed"].values()), bad)


def build_loadgen(folder: Path) -> Loadgen | None:
    """Compile loadgen; return None without Go. Raises CannotMeasure if it does not compile."""
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
    """Claim with redis-py in a child process; return its measurements and CPU seconds."""
    command = [sys.executable, "-m", "benchmarks.direct", "--client", client, "--redis", url, "--prefix", prefix]
    output = _run([*command, "--seconds", str(seconds), "--concurrency", str(concurrency)])
    found = json.loads(output)
    return Load(found["seconds"], found["latencies_us"], found["wrong"]), found["cpu_s"]


def redis_benchmark(port: int, *, concurrency: int, calls: int) -> float | None:
    """Return redis-benchmark's `SET NX GET PX` per second, or None without it."""
    binary = shutil.which("redis-benchmark")
    if binary is None:
        return None
    command = [binary, "-p", str(port), "-c", str(concurrency), "-n", str(calls), "-r", "1000000000", "--csv"]
    output = _run([*command, "SET", "redis-benchmark:__rand_int__", "1", "NX", "GET", "PX", "60000"])
    return float(next(csv.DictReader(io.StringIO(output)))["rps"])


def noop_answer(transaction_id: str) -> ConstantAnswer:
    """Return a claim for the no-op rpc, with an empty answer."""
    return ConstantAnswer(_hot_claim(transaction_id, retry=False).SerializeToString(), 0)


@contextmanager
def claimed(target: str, transaction_id: str, *, retry: bool) -> Iterator[ConstantAnswer]:
    """Claim the id, yield the expected answer to later claims, and check it again at the end.

    Later claims receive DUPLICATE, or, as retries with the same token, CLAIMED and replayed. Raises CannotMeasure
    otherwise.
    """
    with grpc.insecure_channel(target) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        request = _hot_claim(transaction_id, retry=retry)
        first = stub.ClaimTransaction(request, timeout=_CALL_TIMEOUT_S)
        if first.outcome != dedup_pb2.CLAIM_OUTCOME_CLAIMED or first.replayed:
            raise CannotMeasure(f"{target}: the first claim of {transaction_id} received {first}")
        later = stub.ClaimTransaction(request, timeout=_CALL_TIMEOUT_S)
        expected = dedup_pb2.CLAIM_OUTCOME_CLAIMED if retry else dedup_pb2.CLAIM_OUTCOME_DUPLICATE
        if later.outcome != expected or later.replayed != retry:
            raise CannotMeasure(f"{target}: a later claim of {transaction_id} received {later}")
        yield ConstantAnswer(request.SerializeToString(), later.ByteSize())
        last = stub.ClaimTransaction(request, timeout=_CALL_TIMEOUT_S)
        if last != later:
            raise CannotMeasure(
                f"{target}: a claim of {transaction_id} received {later} before and {last} after the measurement"
            )


async def double_claims(target: str, run: str, ids: int) -> int:
    """Claim each id 16 times concurrently, and return the number of ids not CLAIMED exactly once."""
    async with AsyncExitStack() as stack:
        stubs = []
        for number in range(_CHECK_CONNECTIONS):
            # Channels with equal options share a connection.
            channel = grpc.aio.insecure_channel(target, options=(("dedup.benchmark", number),))
            stubs.append(dedup_pb2_grpc.DedupServiceStub(await stack.enter_async_context(channel)))

        async def race(number: int) -> bool:
            request = dedup_pb2.ClaimTransactionRequest(transaction_id=f"{run}:{number}")
            calls = [
                stub.ClaimTransaction(request, timeout=_CALL_TIMEOUT_S)
                for stub in stubs * (_RIVALS // _CHECK_CONNECTIONS)
            ]
            replies = [await call for call in calls]
            return [reply.outcome for reply in replies].count(dedup_pb2.CLAIM_OUTCOME_CLAIMED) == 1

        return [await race(number) for number in range(ids)].count(False)


def _hot_claim(transaction_id: str, *, retry: bool) -> dedup_pb2.ClaimTransactionRequest:
    """Return a claim of the hot id; a retry has the token of the holder."""
    request = dedup_pb2.ClaimTransactionRequest(transaction_id=transaction_id, claimant="benchmark")
    request.ttl.FromSeconds(_HOT_TTL_S)
    if retry:
        request.claim_token = _TOKEN
    return request


def _run(command: Sequence[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if ended.returncode:
        raise CannotMeasure(f"`{' '.join(command)}` ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return ended.stdout
