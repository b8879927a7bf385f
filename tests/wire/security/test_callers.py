"""Callers as the service knows them, by token or certificate, and what each of them may ask for."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.api.servicer import METHODS
from tests.support.certificates import Authority
from tests.support.errors import RefusedCall, refused
from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess, free_port, run_command
from tests.support.workers import channel_to

pytestmark = pytest.mark.every_engine

Claim = dedup_pb2.ClaimTransactionRequest
CLAIMED = dedup_pb2.CLAIM_OUTCOME_CLAIMED
Start = Callable[..., ServiceProcess]

BOX, REFUNDS, SPARE = "box-token-0123456789", "refunds-token-012345", "spare-token-01234567"
TOKENS = f"""
lucky-box = ["{BOX}", "{SPARE}"]
refunds = "{REFUNDS}"
"""
POLICIES = """
[callers.lucky-box]
namespaces = ["pay", "default"]

[callers.refunds]
rpcs = ["GetTransaction"]
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The token file and the policy file of this test, written as above."""
    tokens, policies = tmp_path / "tokens.toml", tmp_path / "policies.toml"
    tokens.touch(0o600)
    tokens.write_text(TOKENS)
    policies.write_text(POLICIES)
    return tokens, policies


@pytest.fixture
def guarded(start_service: Start, redis_server: RedisProcess, files: tuple[Path, Path]) -> ServiceProcess:
    """A service that asks for tokens, on each engine."""
    tokens, policies = files
    return start_service(
        *("--store-url", redis_server.url, "--auth-tokens", str(tokens), "--policy-file", str(policies)),
    )


def ask(service: ServiceProcess, token: str | None, method: str, request: Any, *, header: str = "") -> Any:
    """Call one method with a token, or with a whole authorization header."""
    value = header or f"Bearer {token}"
    metadata = (("authorization", value),) if token is not None or header else ()
    with service.channel() as channel:
        return getattr(dedup_pb2_grpc.DedupServiceStub(channel), method)(request, metadata=metadata, timeout=10)


def claim(
    service: ServiceProcess, token: str | None, transaction_id: str, namespace: str = "", header: str = ""
) -> int:
    """Claim, and return the outcome."""
    request = Claim(transaction_id=transaction_id, namespace=namespace)
    return int(ask(service, token, "ClaimTransaction", request, header=header).outcome)


def told(answer: RefusedCall) -> tuple[str, str, str]:
    """Return the code, the reason and whether it was applied."""
    return answer.code.name, answer.reason, answer.applied


UNKNOWN = ("UNAUTHENTICATED", "CALLER_UNKNOWN", "no")
NOT_ALLOWED = ("PERMISSION_DENIED", "CALLER_NOT_ALLOWED", "no")


def test_calls_without_a_known_token_are_refused(guarded: ServiceProcess, unique: str) -> None:
    """Without a token, with a wrong one, with part of one or with another scheme nothing is claimed.

    Protection: the gate before every rpc.
    """
    for header in ("", "Bearer ", "Bearer wrong-token-01234", f"Bearer {BOX[:-1]}", f"Bearer {BOX}x", f"Basic {BOX}"):
        answer = refused(lambda header=header: claim(guarded, None, unique, header=header))  # type: ignore[misc]
        assert told(answer) == UNKNOWN, header
        assert BOX[:-1] not in answer.message
    assert claim(guarded, BOX, unique) == CLAIMED
    assert claim(guarded, None, f"{unique}-2", header=f"bearer {SPARE}") == CLAIMED


@pytest.mark.parametrize("method", METHODS)
def test_every_rpc_is_behind_the_gate(guarded: ServiceProcess, method: str) -> None:
    """No rpc of the contract answers a caller without a token, or one that may not call it."""
    request = getattr(dedup_pb2, f"{method}Request")()
    assert told(refused(lambda: ask(guarded, None, method, request))) == UNKNOWN
    answer = refused(lambda: ask(guarded, REFUNDS, method, request))
    assert told(answer) == (
        ("INVALID_ARGUMENT", "INVALID_REQUEST", "no") if method == "GetTransaction" else NOT_ALLOWED
    )


@pytest.mark.parametrize("method", [method for method in METHODS if not method.startswith("Batch")])
def test_a_namespace_that_is_not_the_callers_is_rejected(guarded: ServiceProcess, unique: str, method: str) -> None:
    """Whatever is asked of a namespace of somebody else is PERMISSION_DENIED and names it; nothing was done.

    Protection: the check where the rules of a namespace are looked up.
    """
    request = getattr(dedup_pb2, f"{method}Request")(transaction_id=unique, namespace="refunds")
    answer = refused(lambda: ask(guarded, BOX, method, request))
    assert told(answer) == NOT_ALLOWED
    assert "'lucky-box' may not use the namespace 'refunds'" in answer.message
    look = dedup_pb2.GetTransactionRequest(transaction_id=unique, namespace="refunds")
    assert refused(lambda: ask(guarded, REFUNDS, "GetTransaction", look)).code is grpc.StatusCode.NOT_FOUND


def test_entries_of_a_batch_are_rejected_alone(guarded: ServiceProcess, unique: str) -> None:
    """The entry in a foreign namespace fails with the same reason, and its neighbours are claimed."""
    requests = [Claim(transaction_id=unique, namespace=namespace) for namespace in ("pay", "refunds", "")]
    batch = dedup_pb2.BatchClaimTransactionsRequest(requests=requests)
    entries = ask(guarded, BOX, "BatchClaimTransactions", batch).entries
    assert [entry.response.outcome for entry in entries] == [CLAIMED, dedup_pb2.CLAIM_OUTCOME_UNSPECIFIED, CLAIMED]
    assert entries[1].error.code == grpc.StatusCode.PERMISSION_DENIED.value[0]


def test_the_log_says_who_called(guarded: ServiceProcess, unique: str) -> None:
    """A line of a call has the name of its caller, also of one that was refused, and a refusal is a warning."""
    claim(guarded, BOX, unique)
    refused(lambda: claim(guarded, REFUNDS, unique))
    wait_until(lambda: len(guarded.events("call_finished")) == 2, what="the log lines")
    assert [(line["caller"], line["level"]) for line in guarded.events("call_finished")] == [
        ("lucky-box", "info"),
        ("refunds", "warning"),
    ]


def test_tokens_and_callers_are_reread(guarded: ServiceProcess, files: tuple[Path, Path], unique: str) -> None:
    """After SIGHUP a revoked token is refused and a new one counts; a broken file leaves those of before in force."""
    tokens, policies = files
    fresh = "fresh-token-01234567"
    tokens.write_text(f'lucky-box = "{fresh}"')
    policies.write_text("[callers.lucky-box]")
    guarded.signal(signal.SIGHUP)
    wait_until(lambda: len(guarded.events("policy_loaded")) == 2, what="the rules")
    assert guarded.events("tokens_loaded")[0]["tokens"] == 1
    assert told(refused(lambda: claim(guarded, BOX, unique))) == UNKNOWN
    assert claim(guarded, fresh, unique, "refunds") == CLAIMED
    tokens.write_text("lucky-box = ")
    guarded.signal(signal.SIGHUP)
    wait_until(lambda: guarded.events("tokens_reload_failed"), what="the refusal of the file")
    assert claim(guarded, fresh, f"{unique}-2") == CLAIMED


def test_health_needs_no_token(guarded: ServiceProcess) -> None:
    """Probes have none."""
    checked = run_command("healthcheck", "--target", guarded.target)
    assert (checked.returncode, checked.stdout) == (0, "SERVING\n")


def test_without_a_table_of_callers_every_known_one_may_do_everything(
    start_service: Start, redis_server: RedisProcess, files: tuple[Path, Path], unique: str
) -> None:
    """A token alone opens all namespaces where the policy file says nothing of callers."""
    service = start_service("--store-url", redis_server.url, "--auth-tokens", str(files[0]))
    assert claim(service, REFUNDS, unique, "pay") == CLAIMED
    assert told(refused(lambda: claim(service, None, unique))) == UNKNOWN


def test_a_caller_that_is_not_in_the_policy_file_is_rejected(
    guarded: ServiceProcess, files: tuple[Path, Path], unique: str
) -> None:
    """Once the file has callers, a token of somebody else opens nothing."""
    files[0].write_text(TOKENS + 'stranger = "strangers-token-0123"')
    guarded.signal(signal.SIGHUP)
    wait_until(lambda: guarded.events("tokens_loaded"), what="the tokens")
    answer = refused(lambda: claim(guarded, "strangers-token-0123", unique))
    assert told(answer) == NOT_ALLOWED
    assert "'stranger' is not in the policy file" in answer.message


def test_callers_without_anybody_asking_are_refused_at_the_start(files: tuple[Path, Path]) -> None:
    """A policy file with callers does not start a server that would let everybody in."""
    ended = run_command("serve", "--listen", "127.0.0.1:0", "--policy-file", str(files[1]))
    assert ended.returncode == 2
    assert "set DEDUP_TLS_CLIENT_CA or DEDUP_AUTH_TOKENS" in ended.stderr


@pytest.mark.parametrize(
    ("names", "namespace", "outcome"),
    [
        (("", "spiffe://example.org/ns/pay"), "pay", CLAIMED),
        (("", "api.example", "spiffe://example.org/ns/pay"), "pay", CLAIMED),
        (("", "spiffe://example.org/ns/pay"), "other", NOT_ALLOWED),
        (("old-style",), "other", CLAIMED),
        # A common name that stands beside alternative names does not count.
        (("old-style", "api.example"), "other", NOT_ALLOWED),
        (("",), "pay", UNKNOWN),
    ],
)
def test_certificates_name_callers(
    start_grpcio: Start,
    tmp_path: Path,
    names: tuple[str, ...],
    namespace: str,
    outcome: object,
) -> None:
    """Who shows a certificate is the caller of one of its alternative names, or of its common name if it has none."""
    policies = tmp_path / "policies.toml"
    policies.write_text('[callers."spiffe://example.org/ns/pay"]\nnamespaces = ["pay"]\n[callers.old-style]\n')
    authority = Authority(tmp_path)
    cert, key = authority.server_files()
    service = start_grpcio(
        *("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.file)),
        *("--policy-file", str(policies), "--store-url", f"sqlite://{tmp_path / 'claims.db'}"),
    )
    common_name, *alternatives = names
    credentials = authority.credentials(authority.caller_files("caller", *alternatives, common_name=common_name))
    request = Claim(transaction_id="order", namespace=namespace)
    with grpc.secure_channel(service.target, credentials) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        if outcome == CLAIMED:
            assert stub.ClaimTransaction(request, timeout=10).outcome == CLAIMED
        else:
            assert told(refused(lambda: stub.ClaimTransaction(request, timeout=10))) == outcome


def test_a_token_says_more_than_a_certificate(
    start_grpcio: Start, tmp_path: Path, files: tuple[Path, Path], unique: str
) -> None:
    """Where there are both, a call with a token is that caller's, and one without is that of the certificate."""
    tokens, policies = files
    policies.write_text(
        '[callers."api.example"]\nnamespaces = ["default"]\n[callers.lucky-box]\nnamespaces = ["pay"]\n'
    )
    authority = Authority(tmp_path)
    cert, key = authority.server_files()
    service = start_grpcio(
        *("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.file)),
        *("--policy-file", str(policies), "--auth-tokens", str(tokens)),
        *("--store-url", f"sqlite://{tmp_path / 'claims.db'}"),
    )
    with grpc.secure_channel(
        service.target, authority.credentials(authority.caller_files("api", "api.example"))
    ) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        token = (("authorization", f"Bearer {BOX}"),)
        pay, own = Claim(transaction_id=unique, namespace="pay"), Claim(transaction_id=unique)
        assert stub.ClaimTransaction(own, timeout=10).outcome == CLAIMED
        assert stub.ClaimTransaction(pay, timeout=10, metadata=token).outcome == CLAIMED
        assert told(refused(lambda: stub.ClaimTransaction(pay, timeout=10))) == NOT_ALLOWED
        assert told(refused(lambda: stub.ClaimTransaction(own, timeout=10, metadata=token))) == NOT_ALLOWED
        wrong = (("authorization", "Bearer wrong-token-01234"),)
        assert told(refused(lambda: stub.ClaimTransaction(own, timeout=10, metadata=wrong))) == UNKNOWN


def test_every_worker_asks_who_calls(
    start_service: Start, redis_server: RedisProcess, files: tuple[Path, Path], unique: str
) -> None:
    """Several workers all ask for tokens, all reread them at one SIGHUP, and serve health on one address."""
    tokens = files[0]
    arguments = ("--workers", "2", "--store-url", redis_server.url, "--auth-tokens", str(tokens))
    service = start_service(*arguments, "--health-listen", f"127.0.0.1:{free_port()}")
    request = Claim(transaction_id=unique)
    for channel in (channels := [channel_to(service) for _ in range(8)]):
        call = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction
        assert told(refused(lambda call=call: call(request, timeout=10))) == UNKNOWN  # type: ignore[misc]
        assert call(request, timeout=10, metadata=(("authorization", f"Bearer {BOX}"),)).outcome
    tokens.write_text('lucky-box = "fresh-token-01234567"')
    service.signal(signal.SIGHUP)
    wait_until(lambda: len(service.events("tokens_loaded")) == 2, what="the tokens in both workers")
    for channel in channels:
        call = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction
        header = (("authorization", f"Bearer {BOX}"),)
        assert told(refused(lambda call=call, header=header: call(request, timeout=10, metadata=header))) == UNKNOWN  # type: ignore[misc]
        channel.close()
    assert len({tuple(line["addresses"]) for line in service.events("health_listener_started")}) == 1
    health = service.events("health_listener_started")[0]["addresses"][0]
    assert run_command("healthcheck", "--target", health, "--service", "liveness").stdout == "SERVING\n"


def test_workers_cannot_share_a_socket_for_health() -> None:
    """As for claims, the refusal names the setting."""
    ended = run_command("serve", "--workers", "2", "--health-listen", "unix:///run/dedup-health.sock")
    assert (ended.returncode, "DEDUP_HEALTH_LISTEN has unix:///run" in ended.stderr) == (2, True)
