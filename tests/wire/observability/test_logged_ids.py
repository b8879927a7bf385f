"""Transaction ids in the log, and the command that prints them in the same form."""

import hashlib
import hmac
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.processes import ServiceProcess, run_command

StartService = Callable[..., ServiceProcess]
KEY = "0123456789abcdef"


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    """A key file that ends in a newline, as editors write it."""
    path = tmp_path / "log-id.key"
    path.write_text(f"{KEY}\n")
    return str(path)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_logged_ids_are_keyed_hashes(
    start_service: StartService, key_file: str, tmp_path: Path, unique: str, workers: str
) -> None:
    """The log contains the HMAC of an id with the configured key, and `hash-id` with this key prints the same."""
    store = f"sqlite://{tmp_path / 'claims.db'}"
    environment = {"DEDUP_LOG_ID_KEY_FILE": key_file, "DEDUP_LOG_SAMPLE": "1"}
    service = start_service("--store-url", store, "--workers", workers, environment=environment)
    with service.channel() as channel:
        dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(
            dedup_pb2.ClaimTransactionRequest(transaction_id=unique)
        )
    service.stop()
    [line] = service.events("call_finished")
    assert line["transaction"] == hmac.new(KEY.encode(), unique.encode(), "sha256").hexdigest()[:16]
    assert run_command("hash-id", unique, environment=environment).stdout == f"{line['transaction']}\n"
    assert run_command("hash-id", "--log-id-key-file", key_file, unique).stdout == f"{line['transaction']}\n"
    assert run_command("hash-id", unique).stdout == f"{hashlib.sha256(unique.encode()).hexdigest()[:16]}\n"


def test_many_ids_are_read_from_standard_input() -> None:
    """With -, each line of standard input is an id, trailing spaces included, and `--json` prints both forms."""
    command = [sys.executable, "-m", "dedup_service", "hash-id", "first", "-", "--json"]
    given = "grün \r\n\nlast".encode()
    printed = subprocess.run(command, input=given, capture_output=True, check=True, timeout=60).stdout.decode()
    assert [json.loads(line) for line in printed.splitlines()] == [
        {"transaction_id": each, "transaction": hashlib.sha256(each.encode()).hexdigest()[:16]}
        for each in ("first", "grün ", "last")
    ]


def test_an_id_that_is_not_utf8_is_rejected_with_its_line() -> None:
    """An id that is not valid UTF-8 is a usage error that names its line."""
    command = [sys.executable, "-m", "dedup_service", "hash-id", "-"]
    run = subprocess.run(command, input=b"good\n\xff\n", capture_output=True, check=False, timeout=60)
    assert run.returncode == 2
    assert b"line 2 is not valid UTF-8" in run.stderr


def test_ids_are_printed_unchanged_for_a_plain_log(key_file: str) -> None:
    """With plain ids in the log, `hash-id` prints the ids themselves, with or without a key."""
    environment = {"DEDUP_LOG_TRANSACTION_IDS": "plain", "DEDUP_LOG_ID_KEY_FILE": key_file}
    assert run_command("hash-id", "x", environment=environment).stdout == "x\n"


@pytest.mark.parametrize("command", [("serve", "--listen", "127.0.0.1:0"), ("hash-id", "x")])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "No such file or directory"), (b"", "holds 0 bytes"), (b" 0123456789abcde\n", "holds 15 bytes")],
)
def test_an_invalid_key_file_is_rejected(
    tmp_path: Path, command: tuple[str, ...], content: bytes | None, complaint: str
) -> None:
    """The server and `hash-id` reject a missing, empty or short key file, and name the setting and the file."""
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    store = f"sqlite://{tmp_path / 'claims.db'}"
    environment = {"DEDUP_LOG_ID_KEY_FILE": str(path), "DEDUP_STORE_URL": store}
    ended = run_command(*command, environment=environment)
    assert ended.returncode == 2
    assert ended.stderr.startswith("dedup-service: DEDUP_LOG_ID_KEY_FILE (--log-id-key-file): ")
    assert complaint in ended.stderr
    assert str(path) in ended.stderr
