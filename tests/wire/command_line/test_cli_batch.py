"""`dedup-service batch` against a real server: outcomes, files, retries and exit codes."""

import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from dedup import batches
from dedup.errors import CallFailed, Unavailable
from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.cli.commands import app
from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess

pytestmark = pytest.mark.one_store

END_S = 30.0


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of this test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def batch(target: str, *arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
    """Return the exit code, standard output and standard error of a batch."""
    result = CliRunner().invoke(app, ["batch", *arguments, "--target", target], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def summary(target: str, *arguments: str, stdin: str | None = None) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the JSON summary of a batch."""
    code, stdout, _ = batch(target, *arguments, "--json", stdin=stdin)
    (line,) = stdout.splitlines()
    return code, json.loads(line)


def written(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def held(service: ServiceProcess, transaction_id: str, namespace: str = "default") -> dedup_pb2.Transaction | None:
    """Return a transaction from the service, None if it is not claimed."""
    with service.channel() as channel:
        request = dedup_pb2.GetTransactionRequest(transaction_id=transaction_id, namespace=namespace)
        try:
            return dedup_pb2_grpc.DedupServiceStub(channel).GetTransaction(request, timeout=5).transaction
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017 - anything else fails the test
            return None


def test_every_line_is_answered_in_order(service: ServiceProcess, unique: str, folder: Path) -> None:
    """Every line has its result, in input order, over several chunks, invalid lines and duplicates included.

    Only their owner can read the files, and a token in the results holds its transaction.
    """
    bad = ["{broken", json.dumps({"transaction_id": 7}), json.dumps({"transaction_id": unique, "ttl": "soon"})]
    lines = [f"{unique}-0", "", f"{unique}-1", *bad, f"{unique}-0", json.dumps({"transaction_id": f"{unique}-2"})]
    (folder / "ids").write_text("\n".join(lines))
    code, stdout, stderr = batch(service.target, "ids", "--results", "results", "--chunk", "3")
    assert (code, stdout.splitlines()[0], stderr) == (1, "DONE, WITH FAILURES", "")
    rows = dict(line.split(maxsplit=1) for line in stdout.splitlines()[1:5])
    assert rows == {"claimed": "3", "duplicate": "1", "mismatch": "0", "failed": "3"}
    assert "ids.failures.jsonl" in stdout
    results = written(folder / "results")
    assert [(row["line"], row["outcome"].removeprefix("CLAIM_OUTCOME_")) for row in results] == [
        *((1, "CLAIMED"), (3, "CLAIMED"), (4, "FAILED"), (5, "FAILED"), (6, "FAILED"), (7, "DUPLICATE")),
        (8, "CLAIMED"),
    ]
    assert [row["transaction_id"] for row in results if row["transaction"]] == [f"{unique}-{n}" for n in (0, 1, 0, 2)]
    assert [bool(row["claim_token"]) for row in results] == [True, True, False, False, False, False, True]
    failures = written(folder / "ids.failures.jsonl")
    assert [(row["line"], row["input"]) for row in failures] == [*zip((4, 5, 6), bad, strict=True)]
    assert {(row["error"]["reason"], row["error"]["applied"]) for row in failures} == {("BAD_LINE", "no")}
    assert all(row["error"]["message"] for row in failures)
    for name in ("results", "ids.failures.jsonl"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    first = results[0]
    release = ("release", first["transaction_id"], "--token", first["claim_token"], "--target", service.target)
    assert CliRunner().invoke(app, [*release]).exit_code == 0


def test_standard_input_and_one_object(service: ServiceProcess, unique: str, folder: Path) -> None:
    """`batch -` reads standard input, `--json` prints one object, and a batch without failures creates no file."""
    code, counts = summary(service.target, "-", stdin=f"\ufeff{unique}-é\r\n\n  \n{unique} b\n")
    assert code == 0
    assert counts.pop("seconds") < END_S
    nothing_else = dict.fromkeys(("duplicate", "mismatch", "failed", "shadow_duplicate"), 0)
    assert counts == {"claimed": 2, "failures_file": None, "interrupted": False, **nothing_else}
    assert held(service, f"{unique}-é")
    assert held(service, f"{unique} b")
    assert not list(folder.iterdir())


def test_duplicates_and_mismatches_exit_with_3(service: ServiceProcess, unique: str) -> None:
    """Without failures, duplicates and mismatches make the exit code 3."""
    lines = [json.dumps({"transaction_id": unique, "payload_fingerprint": digest}) for digest in ("YQ==", "Yg", "YQ")]
    code, counts = summary(service.target, "-", stdin="\n".join(lines))
    assert (code, counts["claimed"], counts["duplicate"], counts["mismatch"], counts["failed"]) == (3, 1, 1, 1, 0)


def test_options_are_defaults_for_lines(service: ServiceProcess, unique: str) -> None:
    """`--namespace`, `--ttl` and `--claimant` are defaults, and a line overrides them."""
    own = {"transaction_id": f"{unique}-own", "namespace": "own", "ttl": "90s", "claimant": "bert"}
    lines = f"{unique}\n{json.dumps(own | {'claim_token': 'token-of-sixteen'})}\n"
    options = ("--namespace", "pay", "--ttl", "30s", "--claimant", "anna", "--results", "results")
    assert batch(service.target, "-", *options, stdin=lines)[0] == 0
    for transaction, claimant, seconds in (
        (held(service, unique, "pay"), "anna", 30),
        (held(service, f"{unique}-own", "own"), "bert", 90),
    ):
        assert transaction is not None
        lives_ms = transaction.expire_time.ToMilliseconds() - transaction.claim_time.ToMilliseconds()
        assert (transaction.claimant, lives_ms) == (claimant, seconds * 1000)
    assert written(Path("results"))[1]["claim_token"] == "token-of-sixteen"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"\xff\xfe", "is not valid UTF-8"),
        (b"x" * 5_000, "is longer than 4000 bytes"),
        (b'{"transaction_id": "a", "transaction_id": "b"}', "sets a field twice"),
        (b'{"transaction_id": "a", "payload_fingerprint": "!!"}', "payload_fingerprint is not base64"),
        (b'{"transaction_id": "a", "payload_fingerprint": 7}', "payload_fingerprint"),
        (b'{"transaction_id": "a", "ttl": "5s", "expire_time": "2100-01-01T00:00:00Z"}', "expiry"),
        (b'{"transaction_id": "\\ud800"}', ""),
        (b'{"a":' + b"[" * 3_900, ""),
        (b'{"id": "a"}', '"id"'),
    ],
    ids=range(9),
)
def test_an_unreadable_line_fails_alone(unique: str, folder: Path, line: bytes, words: str) -> None:
    """An unreadable line is recorded with its problem, sends nothing to the server, and does not stop the batch."""
    (folder / unique).write_bytes(line + b"\n" + line)
    code, counts = summary(f"unix://{folder / 'missing.sock'}", unique)
    assert (code, counts["failed"], counts["failures_file"]) == (1, 2, f"{unique}.failures.jsonl")
    failures = written(folder / f"{unique}.failures.jsonl")
    assert [row["line"] for row in failures] == [1, 2]
    for row in failures:
        assert words in row["error"]["message"]
        assert (row["error"]["reason"], "request" in row) == ("BAD_LINE", False)


def test_a_claim_rejected_by_the_server_fails_alone(service: ServiceProcess, unique: str, folder: Path) -> None:
    """An invalid claim fails alone, with the server's code and reason."""
    refused = json.dumps({"transaction_id": unique, "namespace": "NO"})
    code, counts = summary(service.target, "-", stdin=f"{refused}\n{unique}\n")
    assert (code, counts["claimed"], counts["failed"]) == (1, 1, 1)
    (row,) = written(folder / "batch.failures.jsonl")
    error = row["error"]
    assert (error["code"], error["reason"], error["applied"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "no")
    assert "namespace" in error["message"]


def test_existing_files_are_never_overwritten(service: ServiceProcess, unique: str, folder: Path) -> None:
    """An existing file of failures or results ends the batch with 2 before anything is claimed."""
    (folder / "ids").write_text(unique)
    for name, flag in (("ids.failures.jsonl", "--failures"), ("results", "--results")):
        (folder / name).write_text("precious")
        code, stdout, stderr = batch(service.target, "ids", "--results", "results")
        assert (code, stdout) == (2, "")
        assert f"{flag}: '{name}' exists already" in " ".join(stderr.split())
        assert (folder / name).read_text() == "precious"
        (folder / name).unlink()
    assert held(service, unique) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing",), "FILE: cannot be read"),
        (("-", "--chunk", "1001"), "'--chunk': "),
        (("-", "--ttl", "soon"), "--ttl: 'soon' is not a duration"),
        (("-", "--timeout", "0s"), "--timeout: '0s' is too short"),
        (("-", "--results", "x", "--failures", "x"), "--failures: must differ from --results"),
        (("-", "--results", "nowhere/x"), "--results: 'nowhere/x' cannot be created"),
        (("-", "--failures", "nowhere/x"), "--failures: 'nowhere/x' cannot be created"),
    ],
)
def test_bad_usage_names_the_flag(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    """An invalid flag or file exits with 2 and a sentence that names it, and creates no file."""
    code, stdout, stderr = batch("127.0.0.1:1", *arguments, stdin="never read")
    assert (code, stdout) == (2, "")
    assert words in " ".join(stderr.split())
    assert not list(folder.iterdir())


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of claims in each call to a server, in order."""
    sizes: list[int] = []
    attempt = batches._attempt

    def counted(stub: Any, requests: Any, timeout_s: float, *, wait_for_ready: bool) -> Any:
        try:
            return attempt(stub, requests, timeout_s, wait_for_ready=wait_for_ready)
        finally:
            sizes.append(len(requests))

    monkeypatch.setattr(batches, "_attempt", counted)
    return sizes


def test_an_unreachable_server_fails_every_line(
    unique: str, folder: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[int]
) -> None:
    """Without a server, each chunk is tried four times, and every claim is recorded with its token.

    It may have been made.
    """
    monkeypatch.setattr("dedup_service.cli.batch._FIRST_BACKOFF_S", 0.01)
    (folder / "ids").write_text("".join(f"{unique}-{number}\n" for number in range(3)))
    options = ("--chunk", "2", "--results", "results", "--failures", "failed", "--timeout", "100ms")
    code, stdout, _ = batch(f"unix://{folder / 'missing.sock'}", "ids", *options)
    assert (code, attempts) == (1, [2, 2, 2, 2, 1, 1, 1, 1])
    assert "  failed       3\n" in stdout
    failures = written(folder / "failed")
    assert [row["input"] for row in failures] == [f"{unique}-{number}" for number in range(3)]
    assert {(row["error"]["code"], row["error"]["applied"]) for row in failures} == {("UNAVAILABLE", "unknown")}
    tokens = [row["request"]["claim_token"] for row in failures]
    assert len(set(tokens)) == 3
    assert [row["claim_token"] for row in written(folder / "results")] == tokens


def test_a_batch_waits_for_a_server_that_comes_back(
    start_service: Callable[..., ServiceProcess], unique: str, folder: Path, attempts: list[int]
) -> None:
    """A short outage of the server fails no line."""
    address = f"unix://{folder / 's.sock'}"
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(summary, address, "-", stdin=unique)
        wait_until(lambda: attempts, what="the first attempt to fail")
        start_service("--listen", address, "--store-url", f"sqlite://{folder / 'claims.db'}")
        code, counts = running.result(END_S)
    assert (code, counts["claimed"], counts["failed"]) == (0, 1, 0)


@pytest.mark.parametrize(("lost_answers", "applied"), [(0, "no"), (1, "unknown")])
def test_an_unknown_outcome_persists_after_a_later_error(
    unique: str, folder: Path, monkeypatch: pytest.MonkeyPatch, lost_answers: int, applied: str
) -> None:
    """If an earlier attempt may have been applied, the claim is recorded as `unknown`, whatever the last error says."""
    lost = Unavailable("away", code=grpc.StatusCode.UNAVAILABLE, applied="unknown")
    refused = CallFailed("not allowed", code=grpc.StatusCode.PERMISSION_DENIED, applied="no")
    answers = [lost] * lost_answers + [refused]
    monkeypatch.setattr(batches, "_attempt", lambda *_, **__: [answers.pop(0)])
    monkeypatch.setattr("dedup_service.cli.batch._FIRST_BACKOFF_S", 0.01)
    code, counts = summary("127.0.0.1:1", "-", stdin=unique)
    assert (code, counts["failed"], answers) == (1, 1, [])
    (row,) = written(folder / "batch.failures.jsonl")
    assert (row["error"]["code"], row["error"]["applied"]) == ("PERMISSION_DENIED", applied)


def test_a_retry_after_a_lost_reply_is_not_a_duplicate(
    start_service: Callable[..., ServiceProcess], unique: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Claims whose replies were lost are retried with the same tokens and receive CLAIMED."""
    redis = RedisProcess(tmp_path_factory.mktemp("redis")).start()
    try:
        service = start_service("--store-url", redis.url, "--store-timeout", "200ms")
        assert summary(service.target, "-", stdin=f"{unique}-warm")[0] == 0
        redis.pause()
        with ThreadPoolExecutor(1) as threads:
            lines = "".join(f"{unique}-{number}\n" for number in range(20))
            running = threads.submit(summary, service.target, "-", stdin=lines)
            wait_until(lambda: len(_batches(service)) >= 2, what="the first attempt to fail")
            redis.resume()
            code, counts = running.result(END_S)
    finally:
        redis.stop()
    assert (code, counts["claimed"], counts["duplicate"]) == (0, 20, 0)
    wait_until(lambda: len(_batches(service)) >= 3, what="the log line of the last attempt")


def _batches(service: ServiceProcess) -> list[dict[str, Any]]:
    return [line for line in service.events("call_finished") if line["method"] == "BatchClaimTransactions"]


def test_lines_are_claimed_before_the_end_of_the_input(service: ServiceProcess, unique: str, folder: Path) -> None:
    """The batch reads at most one chunk ahead: complete chunks are claimed while the input is still being written."""
    os.mkfifo(folder / "pipe")
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(summary, service.target, "pipe", "--chunk", "2", "--results", "results")
        with (folder / "pipe").open("w") as pipe:
            pipe.write(f"{unique}-0\n{unique}-1\n{unique}-2\n")
            pipe.flush()
            results = folder / "results"
            wait_until(lambda: results.exists() and len(written(results)) == 2, what="the results of one chunk")
            assert held(service, f"{unique}-1")
            assert held(service, f"{unique}-2") is None
        code, counts = running.result(END_S)
    assert (code, counts["claimed"]) == (0, 3)


def test_a_file_created_during_the_batch_is_not_overwritten(service: ServiceProcess, unique: str, folder: Path) -> None:
    """If the file of failures appears during the batch, the batch stops with 1 and leaves the file unchanged."""
    os.mkfifo(folder / "pipe")
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(batch, service.target, "pipe", "--chunk", "1", "--failures", "failed")
        with (folder / "pipe").open("w") as pipe:
            pipe.write(f"{unique}\n")
            pipe.flush()
            wait_until(lambda: held(service, unique), what="the first claim")
            (folder / "failed").write_text("precious")
            pipe.write("{broken\n")
        code, stdout, stderr = running.result(END_S)
    assert (code, "  claimed      1\n" in stdout) == (1, True)
    assert "stopped: a file cannot be read or written" in stderr
    assert (folder / "failed").read_text() == "precious"


def test_an_interrupted_batch_keeps_its_tokens(
    service: ServiceProcess, unique: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C exits with 130, and the claims in flight are recorded with the tokens that hold them."""
    attempt = batches._attempt

    def interrupted(stub: Any, requests: Any, timeout_s: float, *, wait_for_ready: bool) -> Any:
        answers = attempt(stub, requests, timeout_s, wait_for_ready=wait_for_ready)
        if requests[0].transaction_id == f"{unique}-0":
            return answers
        raise KeyboardInterrupt

    monkeypatch.setattr(batches, "_attempt", interrupted)
    lines = f"{unique}-0\n{unique}-1\n{unique}-2\n"
    code, counts = summary(service.target, "-", "--chunk", "1", stdin=lines)
    assert (code, counts["interrupted"], counts["claimed"], counts["failed"]) == (130, True, 1, 1)
    (row,) = written(folder / "batch.failures.jsonl")
    assert (row["input"], row["error"]["applied"]) == (f"{unique}-1", "unknown")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    code, counts = summary(service.target, "-", "--failures", "again", stdin=json.dumps(row["request"]))
    assert (code, counts["claimed"]) == (0, 1)
    assert held(service, f"{unique}-2") is None
