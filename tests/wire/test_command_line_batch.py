"""`dedup-service batch` against a real server: outcomes, files, retries, and its exit codes."""

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

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.cli import batch_call
from dedup_service.cli.batch_lines import Line
from dedup_service.cli.channel import failure
from dedup_service.cli.commands import app
from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess

END_S = 30.0


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, so that no test writes anywhere else."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def batch(target: str, *arguments: str, stdin: str | None = None) -> tuple[int, str, str]:
    """Return the exit code, standard output and standard error of one batch."""
    result = CliRunner().invoke(app, ["batch", *arguments, "--target", target], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def summary(target: str, *arguments: str, stdin: str | None = None) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the one object that a batch prints with `--json`."""
    code, stdout, _ = batch(target, *arguments, "--json", stdin=stdin)
    (line,) = stdout.splitlines()
    return code, json.loads(line)


def written(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def held(service: ServiceProcess, transaction_id: str, namespace: str = "default") -> dedup_pb2.Transaction | None:
    """Return what the service knows of a transaction."""
    with service.channel() as channel:
        request = dedup_pb2.GetTransactionRequest(transaction_id=transaction_id, namespace=namespace)
        try:
            return dedup_pb2_grpc.DedupServiceStub(channel).GetTransaction(request, timeout=5).transaction
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017 - anything else fails the test
            return None


def test_every_line_is_answered_in_order(service: ServiceProcess, unique: str, folder: Path) -> None:
    """Over several chunks each line has its result in the order of the input, bad lines and duplicates as well.

    The files are for their owner alone, and a token in the results holds its transaction.
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
    """`batch -` reads standard input, `--json` prints one object, all claimed exits with 0 and leaves no file."""
    code, counts = summary(service.target, "-", stdin=f"\ufeff{unique}-é\r\n\n  \n{unique} b\n")
    assert code == 0
    assert counts.pop("seconds") < END_S
    nothing_else = dict.fromkeys(("duplicate", "mismatch", "failed", "shadow_duplicate"), 0)
    assert counts == {"claimed": 2, "failures_file": None, "interrupted": False, **nothing_else}
    assert held(service, f"{unique}-é")
    assert held(service, f"{unique} b")
    assert not list(folder.iterdir())


def test_duplicates_and_mismatches_exit_with_3(service: ServiceProcess, unique: str) -> None:
    """Without a failure, a duplicate or a mismatch makes the exit code 3."""
    lines = [json.dumps({"transaction_id": unique, "payload_fingerprint": digest}) for digest in ("YQ==", "Yg", "YQ")]
    code, counts = summary(service.target, "-", stdin="\n".join(lines))
    assert (code, counts["claimed"], counts["duplicate"], counts["mismatch"], counts["failed"]) == (3, 1, 1, 1, 0)


def test_options_hold_for_lines_that_do_not_say(service: ServiceProcess, unique: str) -> None:
    """`--namespace`, `--ttl` and `--claimant` are defaults, and what a line says wins."""
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
        (b'{"transaction_id": "a", "transaction_id": "b"}', "says a field twice"),
        (b'{"transaction_id": "a", "payload_fingerprint": "!!"}', "payload_fingerprint is not base64"),
        (b'{"transaction_id": "a", "payload_fingerprint": 7}', "payload_fingerprint"),
        (b'{"transaction_id": "a", "ttl": "5s", "expire_time": "2100-01-01T00:00:00Z"}', "expiry"),
        (b'{"transaction_id": "\\ud800"}', ""),
        (b'{"a":' + b"[" * 3_900, ""),
        (b'{"id": "a"}', '"id"'),
    ],
    ids=range(9),
)
def test_a_bad_line_is_a_failure_of_its_own(unique: str, folder: Path, line: bytes, words: str) -> None:
    """A line that cannot be read is noted with its reason, asks the server nothing, and stops nothing."""
    (folder / unique).write_bytes(line + b"\n" + line)
    code, counts = summary(f"unix://{folder / 'nobody.sock'}", unique)
    assert (code, counts["failed"], counts["failures_file"]) == (1, 2, f"{unique}.failures.jsonl")
    failures = written(folder / f"{unique}.failures.jsonl")
    assert [row["line"] for row in failures] == [1, 2]
    for row in failures:
        assert words in row["error"]["message"]
        assert (row["error"]["reason"], "request" in row) == ("BAD_LINE", False)


def test_what_the_server_refuses_is_a_failure_of_one_line(service: ServiceProcess, unique: str, folder: Path) -> None:
    """A claim that breaks the contract fails alone, with the code and the reason of the server."""
    refused = json.dumps({"transaction_id": unique, "namespace": "NO"})
    code, counts = summary(service.target, "-", stdin=f"{refused}\n{unique}\n")
    assert (code, counts["claimed"], counts["failed"]) == (1, 1, 1)
    (row,) = written(folder / "batch.failures.jsonl")
    error = row["error"]
    assert (error["code"], error["reason"], error["applied"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "no")
    assert "namespace" in error["message"]


def test_existing_files_are_never_written_over(service: ServiceProcess, unique: str, folder: Path) -> None:
    """A file of failures or results that is there already ends the batch with 2 before anything is claimed."""
    (folder / "ids").write_text(unique)
    for name, flag in (("ids.failures.jsonl", "--failures"), ("results", "--results")):
        (folder / name).write_text("precious")
        code, stdout, stderr = batch(service.target, "ids", "--results", "results")
        assert (code, stdout) == (2, "")
        assert f"{flag}: '{name}' is there already" in " ".join(stderr.split())
        assert (folder / name).read_text() == "precious"
        (folder / name).unlink()
    assert held(service, unique) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing",), "FILE: cannot be read"),
        (("-", "--chunk", "1001"), "'--chunk': "),
        (("-", "--ttl", "soon"), "--ttl: 'soon' is not a duration"),
        (("-", "--timeout", "0s"), "--timeout: '0s' is no time at all"),
        (("-", "--results", "x", "--failures", "x"), "--failures: is the file of the results"),
        (("-", "--results", "nowhere/x"), "--results: 'nowhere/x' cannot be made"),
        (("-", "--failures", "nowhere/x"), "--failures: 'nowhere/x' cannot be made"),
    ],
)
def test_bad_usage_names_the_flag(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    """A bad flag or file ends the batch with 2 and one sentence that names it, and leaves no file."""
    code, stdout, stderr = batch("127.0.0.1:1", *arguments, stdin="never read")
    assert (code, stdout) == (2, "")
    assert words in " ".join(stderr.split())
    assert not list(folder.iterdir())


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many lines each call to a server asked for, in the order of the calls."""
    sizes: list[int] = []
    attempt = batch_call._attempt

    def counted(stub: Any, lines: Any, timeout_s: float, *, again: bool) -> Any:
        try:
            return attempt(stub, lines, timeout_s, again=again)
        finally:
            sizes.append(len(lines))

    monkeypatch.setattr(batch_call, "_attempt", counted)
    return sizes


def test_an_unreachable_server_fails_every_line(
    unique: str, folder: Path, monkeypatch: pytest.MonkeyPatch, attempts: list[int]
) -> None:
    """When no server answers, each chunk is tried four times and given up, and every claim is written down.

    With its token, since it may have been made.
    """
    monkeypatch.setattr(batch_call, "_BACKOFF_S", 0.01)
    (folder / "ids").write_text("".join(f"{unique}-{number}\n" for number in range(3)))
    options = ("--chunk", "2", "--results", "results", "--failures", "failed", "--timeout", "100ms")
    code, stdout, _ = batch(f"unix://{folder / 'nobody.sock'}", "ids", *options)
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
    """A server that is away for a moment fails no line."""
    address = f"unix://{folder / 's.sock'}"
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(summary, address, "-", stdin=unique)
        wait_until(lambda: attempts, what="the first attempt to fail")
        start_service("--listen", address, "--store-url", f"sqlite://{folder / 'claims.db'}")
        code, counts = running.result(END_S)
    assert (code, counts["claimed"], counts["failed"]) == (0, 1, 0)


def test_a_doubt_is_not_taken_away_by_a_later_error() -> None:
    """A claim that an earlier attempt may have made stays in doubt, whatever the last attempt says."""
    line = Line(1, "x")
    for applied, said in (("no", "no"), ("unknown", "unknown"), ("no", "unknown")):
        line.fail(failure("UNAVAILABLE", "", applied, "away"))
        assert line.error is not None
        assert line.error["applied"] == said


def test_a_lost_answer_is_no_duplicate_of_itself(
    start_service: Callable[..., ServiceProcess], unique: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Claims whose answers were lost are repeated with the same tokens, and told CLAIMED."""
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
    assert len(_batches(service)) >= 3


def _batches(service: ServiceProcess) -> list[dict[str, Any]]:
    return [line for line in service.events("call_finished") if line["method"] == "BatchClaimTransactions"]


def test_lines_are_claimed_before_the_input_has_ended(service: ServiceProcess, unique: str, folder: Path) -> None:
    """No more than a chunk is read ahead: what is there is claimed while the input is still being written."""
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


def test_a_file_that_comes_in_between_is_not_written_over(service: ServiceProcess, unique: str, folder: Path) -> None:
    """When the file of failures appears while the batch runs, the batch stops with 1 and leaves it as it is."""
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
    assert "stopped, since a file failed" in stderr
    assert (folder / "failed").read_text() == "precious"


def test_an_interrupted_batch_keeps_its_tokens(
    service: ServiceProcess, unique: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the batch with 130, and the claims under way are written down with the tokens that hold them."""
    attempt = batch_call._attempt

    def interrupted(stub: Any, lines: Any, timeout_s: float, *, again: bool) -> Any:
        if lines[0].number == 1:
            return attempt(stub, lines, timeout_s, again=again)
        requests = [line.request for line in lines]
        stub.BatchClaimTransactions(dedup_pb2.BatchClaimTransactionsRequest(requests=requests), timeout=timeout_s)
        raise KeyboardInterrupt

    monkeypatch.setattr(batch_call, "_attempt", interrupted)
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
