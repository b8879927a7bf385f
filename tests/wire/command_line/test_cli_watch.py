"""`dedup-service watch` against a real server: output and exit codes."""

import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from typer.testing import CliRunner

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.cli.commands import app
from tests.support.polling import wait_until
from tests.support.processes import ServiceProcess

pytestmark = pytest.mark.one_store

TOKEN = "token-of-sixteen"
END_S = 20.0

Watched = tuple[int, list[str]]
Watch = Callable[..., Future[Watched]]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Starts `watch` in a thread. The future returns its exit code and output lines."""

    def run(service: ServiceProcess, transaction_id: str, *arguments: str) -> Watched:
        line = ["watch", transaction_id, "--target", service.target, "--interval", "50ms", *arguments]
        result = CliRunner().invoke(app, line)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout.splitlines()

    with ThreadPoolExecutor(1) as threads:
        yield lambda *arguments: threads.submit(run, *arguments)


def look_ups(service: ServiceProcess, transaction_id: str) -> list[datetime]:
    """Return the times of the look-ups that the service logged for this transaction."""
    name = hashlib.sha256(transaction_id.encode()).hexdigest()[:16]
    calls = [line for line in service.events("call_finished") if line["method"] == "GetTransaction"]
    return [datetime.fromisoformat(line["started"]) for line in calls if line["transaction"] == name]


def claim(service: ServiceProcess, transaction_id: str, ttl_s: int = 60) -> None:
    """Claim the transaction under test."""
    with service.channel() as channel:
        request = dedup_pb2.ClaimTransactionRequest(
            transaction_id=transaction_id, claim_token=TOKEN, claimant="anna", ttl=Duration(seconds=ttl_s)
        )
        dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(request, timeout=5)


def complete(service: ServiceProcess, transaction_id: str) -> None:
    """Complete it with a result."""
    with service.channel() as channel:
        request = dedup_pb2.CompleteTransactionRequest(transaction_id=transaction_id, claim_token=TOKEN, result=b"paid")
        dedup_pb2_grpc.DedupServiceStub(channel).CompleteTransaction(request, timeout=5)


def release(service: ServiceProcess, transaction_id: str) -> None:
    """Release it."""
    with service.channel() as channel:
        request = dedup_pb2.ReleaseTransactionRequest(transaction_id=transaction_id, claim_token=TOKEN)
        dedup_pb2_grpc.DedupServiceStub(channel).ReleaseTransaction(request, timeout=5)


def objects(lines: list[str]) -> list[dict[str, Any]]:
    """Parse the lines as JSON objects."""
    return [json.loads(line) for line in lines]


def test_watch_ends_with_the_result(service: ServiceProcess, unique: str, watch: Watch) -> None:
    """`watch` prints a line for each change only, then the result, and exits with 0."""
    claim(service, unique)
    watched = watch(service, unique)
    wait_until(lambda: len(look_ups(service, unique)) >= 3, what="some look-ups")
    complete(service, unique)
    code, lines = watched.result(END_S)
    assert code == 0
    assert "state in progress, claimant anna, since " in lines[0]
    assert lines[1] == "COMPLETED"
    assert "  result       'paid'" in lines


def test_watch_in_json_ends_with_the_completed_transaction(service: ServiceProcess, unique: str, watch: Watch) -> None:
    """`watch --json` prints one object per change, the last with the result, also for a completed transaction."""
    claim(service, unique)
    watched = watch(service, unique, "--json")
    wait_until(lambda: look_ups(service, unique), what="the first look-up")
    complete(service, unique)
    code, lines = watched.result(END_S)
    first, last = objects(lines)
    assert (code, first["state"], last["state"]) == (0, "IN_PROGRESS", "COMPLETED")
    assert first["transaction"]["claimant"] == "anna"
    assert last["transaction"]["result"] == "cGFpZA=="
    code, lines = watch(service, unique, "--json").result(END_S)
    assert (code, objects(lines)[0]["transaction"]) == (0, last["transaction"])


def test_watch_reports_a_probable_release(service: ServiceProcess, unique: str, watch: Watch) -> None:
    """If a claim disappears long before its expiry, `watch` exits with 5 and reports a probable release."""
    claim(service, unique)
    watched = watch(service, unique, "--json")
    wait_until(lambda: look_ups(service, unique), what="the first look-up")
    release(service, unique)
    code, lines = watched.result(END_S)
    first, last = objects(lines)
    assert (code, first["state"], "likely" in first) == (5, "IN_PROGRESS", False)
    assert (last["state"], last["likely"], last["transaction"]) == ("NOT_FOUND", "released", None)


def test_watch_reports_a_probable_expiry(service: ServiceProcess, unique: str, watch: Watch) -> None:
    """If a claim disappears after its expiry, `watch` exits with 5 and reports the probable expiry."""
    claim(service, unique, ttl_s=1)
    code, lines = watch(service, unique).result(END_S)
    assert (code, lines[-1]) == (5, f"NOT FOUND: {unique} is not claimed: it probably expired")


def test_watch_of_an_unclaimed_transaction_ends_at_once(service: ServiceProcess, unique: str, watch: Watch) -> None:
    """Without a claim, `watch` exits with 5 after one look-up and reports no probable cause."""
    assert watch(service, unique).result(END_S) == (5, [f"NOT FOUND: {unique} is not claimed"])
    code, (line,) = watch(service, unique, "--json").result(END_S)
    assert (code, json.loads(line)["state"], "likely" in json.loads(line)) == (5, "NOT_FOUND", False)


def test_watch_respects_the_interval(service: ServiceProcess, unique: str, watch: Watch) -> None:
    """Look-ups start at least the interval apart, however fast the answers arrive."""
    claim(service, unique)
    watched = watch(service, unique, "--interval", "300ms")
    wait_until(lambda: len(look_ups(service, unique)) >= 4, what="four look-ups")
    release(service, unique)
    assert watched.result(END_S)[0] == 5
    moments = look_ups(service, unique)
    # A single look-up may be late, so only the total time is certain.
    assert (moments[-1] - moments[0]).total_seconds() > 0.3 * (len(moments) - 1) - 0.2


def test_watch_survives_a_restart_of_the_server(
    start_service: Callable[..., ServiceProcess], tmp_path: Path, unique: str, watch: Watch
) -> None:
    """`watch` reports an outage of the server once, and continues when the server is back."""
    options = ("--listen", f"unix://{tmp_path / 's.sock'}", "--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    service = start_service(*options)
    claim(service, unique)
    watched = watch(service, unique, "--json")
    wait_until(lambda: look_ups(service, unique), what="the first look-up")
    service.stop()
    again = start_service(*options)
    wait_until(lambda: look_ups(again, unique), what="a look-up after the restart")
    complete(again, unique)
    code, lines = watched.result(END_S)
    seen = objects(lines)
    assert code == 0
    # One outage, reported with up to two errors: the server is stopping, then nothing listens.
    states = [state for state, _ in groupby(found["state"] for found in seen)]
    assert states == ["IN_PROGRESS", "UNKNOWN", "IN_PROGRESS", "COMPLETED"]
    assert {found["error"]["code"] for found in seen if "error" in found} == {"UNAVAILABLE"}
    assert len(seen) <= len(states) + 2


class CancelsFirst(dedup_pb2_grpc.DedupServiceServicer):
    """Cancels the first look-up, as a server does at the end of its shutdown, and answers the second."""

    def __init__(self) -> None:
        self.calls = 0

    def GetTransaction(  # noqa: N802 - The name in the contract.
        self, request: dedup_pb2.GetTransactionRequest, context: grpc.ServicerContext
    ) -> dedup_pb2.GetTransactionResponse:
        """Return a completed transaction."""
        self.calls += 1
        if self.calls == 1:
            context.abort(grpc.StatusCode.CANCELLED, "")
        state = dedup_pb2.TRANSACTION_STATE_COMPLETED
        return dedup_pb2.GetTransactionResponse(
            transaction=dedup_pb2.Transaction(transaction_id=request.transaction_id, state=state)
        )


def test_watch_survives_a_look_up_cancelled_by_a_shutdown() -> None:
    """`watch` treats a call that the server cancels at shutdown as an outage and continues."""
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        dedup_pb2_grpc.add_DedupServiceServicer_to_server(CancelsFirst(), server)  # type: ignore[abstract]
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            line = ["watch", "x", "--target", f"127.0.0.1:{port}", "--interval", "50ms", "--json"]
            result = CliRunner().invoke(app, line)
        finally:
            server.stop(None).wait()
    states = [found["state"] for found in objects(result.stdout.splitlines())]
    assert (result.exit_code, states) == (0, ["UNKNOWN", "COMPLETED"])


def test_watch_on_a_terminal_redraws_in_place_until_ctrl_c(service: ServiceProcess, unique: str) -> None:
    """On a terminal `watch` redraws in place. Ctrl-C exits with 130, without a traceback, and restores the cursor."""
    claim(service, unique)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dedup_service", "watch", unique, "--target", service.target]
    environment = os.environ | {"TERM": "xterm-256color"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            shown = b""
            while shown.count(b"time left") < 2:
                shown += os.read(ours, 4096)
            process.send_signal(signal.SIGINT)
            while piece := _read_to_the_end(ours):
                shown += piece
            assert process.wait(END_S) == 130
        finally:
            process.kill()
            os.close(ours)
    assert b"\x1b[1A\x1b[2K" in shown
    assert b"in progress" in shown
    assert b"Traceback" not in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def _read_to_the_end(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:
        # Linux reports the closed other end as an error.
        return b""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--interval", "0ms"), "--interval: '0ms' is too short"), (("--interval", "1"), "--interval: '1' is not a")],
)
def test_bad_usage_names_the_flag(arguments: tuple[str, ...], words: str) -> None:
    """An invalid interval exits with 2, before any server is called."""
    result = CliRunner().invoke(app, ["watch", "x", *arguments])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
