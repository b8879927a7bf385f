"""Authentication by token or certificate, and the namespaces and rpcs each caller may use."""

import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.api.servicer import METHODS
from dedup_service.config.settings import EngineName
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
    """The token file and the policy file, with the contents of TOKENS and POLICIES."""
    tokens, policies = tmp_path / "tokens.toml", tmp_path / "policies.toml"
    tokens.touch(0o600)
    tokens.write_text(TOKENS)
    policies.write_text(POLICIES)
    return tokens, policies


@pytest.fixture
def guarded(start_service: Start, redis_server: RedisProcess, files: tuple[Path, Path]) -> ServiceProcess:
    """A service that requires tokens, on each engine, for one test that changes its files or reads its log."""
    tokens, policies = files
    return start_service(
        *("--store-url", redis_server.url, "--auth-tokens", str(tokens), "--policy-file", str(policies)),
    )


@pytest.fixture(scope="module")
def shared_guarded(
    engine: EngineName, redis_server: RedisProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """The same service for all other tests."""
    folder = tmp_path_factory.mktemp("guarded")
    tokens, policies = folder / "tokens.toml", folder / "policies.toml"
    tokens.touch(0o600)
    tokens.write_text(TOKENS)
    policies.write_text(POLICIES)
    arguments = ("--store-url", redis_server.url, "--auth-tokens", str(tokens), "--policy-file", str(policies))
    process = ServiceProcess("--engine", engine, *arguments).start()
    yield process
    process.kill()


def call_method(service: ServiceProcess, token: str | None, method: str, request: Any, *, header: str = "") -> Any:
    """Call one method with a token or a complete authorization header."""
    value = header or f"Bearer {token}"
    metadata = (("authorization", value),) if token is not None or header else ()
    with service.channel() as channel:
        return getattr(dedup_pb2_grpc.DedupServiceStub(channel), method)(request, metadata=metadata, timeout=10)


def claim(
    service: ServiceProcess, token: str | None, transaction_id: str, namespace: str = "", header: str = ""
) -> int:
    """Claim and return the outcome."""
    request = Claim(transaction_id=transaction_id, namespace=namespace)
    return int(call_method(service, token, "ClaimTransaction", request, header=header).outcome)


def error_fields(answer: RefusedCall) -> tuple[str, str, str]:
    """Return code, reason and applied."""
    return answer.code.name, answer.reason, answer.applied


UNKNOWN = ("UNAUTHENTICATED", "CALLER_UNKNOWN", "no")
NOT_ALLOWED = ("PERMISSION_DENIED", "CALLER_NOT_ALLOWED", "no")


def test_calls_without_a_valid_token_are_rejected(shared_guarded: ServiceProcess, unique: str) -> None:
    """A missing, wrong or partial token, or another scheme, is UNAUTHENTICATED and claims nothing.

    Protection: the authentication check before every rpc.
    """
    for header in ("", "Bearer ", "Bearer wrong-token-01234", f"Bearer {BOX[:-1]}", f"Bearer {BOX}x", f"Basic {BOX}"):
        answer = refused(lambda header=header: claim(shared_guarded, None, unique, header=header))  # type: ignore[misc]
        assert error_fields(answer) == UNKNOWN, header
        assert BOX[:-1] not in answer.message
    assert claim(shared_guarded, BOX, unique) == CLAIMED
    assert claim(shared_guarded, None, f"{unique}-2", header=f"bearer {SPARE}") == CLAIMED


@pytest.mark.parametrize("method", METHODS)
def test_every_rpc_requires_authorization(shared_guarded: ServiceProcess, method: str) -> None:
    """Every rpc rejects callers without a token and callers that may not use it."""
    request = getattr(dedup_pb2, f"{method}Request")()
    assert error_fields(refused(lambda: call_method(shared_guarded, None, method, request))) == UNKNOWN
    answer = refused(lambda: call_method(shared_guarded, REFUNDS, method, request))
    assert error_fields(answer) == (
        ("INVALID_ARGUMENT", "INVALID_REQUEST", "no") if method == "GetTransaction" else NOT_ALLOWED
    )


@pytest.mark.parametrize("method", [method for method in METHODS if not method.startswith("Batch")])
def test_a_forbidden_namespace_is_rejected(shared_guarded: ServiceProcess, unique: str, method: str) -> None:
    """A call in a namespace that its caller may not use is PERMISSION_DENIED, names it, and changes nothing.

    Protection: the check in the look-up of a namespace's policy.
    """
    request = getattr(dedup_pb2, f"{method}Request")(transaction_id=unique, namespace="refunds")
    answer = refused(lambda: call_method(shared_guarded, BOX, method, request))
    assert error_fields(answer) == NOT_ALLOWED
    assert "'lucky-box' may not use the namespace 'refunds'" in answer.message
    look = dedup_pb2.GetTransactionRequest(transaction_id=unique, namespace="refunds")
    assert (
        refused(lambda: call_method(shared_guarded, REFUNDS, "GetTransaction", look)).code is grpc.StatusCode.NOT_FOUND
    )


def test_a_forbidden_batch_entry_fails_alone(shared_guarded: ServiceProcess, unique: str) -> None:
    """A batch entry in a forbidden namespace fails with the same reason, and the other entries are claimed."""
    requests = [Claim(transaction_id=unique, namespace=namespace) for namespace in ("pay", "refunds", "")]
    batch = dedup_pb2.BatchClaimTransactionsRequest(requests=requests)
    entries = call_method(shared_guarded, BOX, "BatchClaimTransactions", batch).entries
    assert [entry.response.outcome for entry in entries] == [CLAIMED, dedup_pb2.CLAIM_OUTCOME_UNSPECIFIED, CLAIMED]
    assert entries[1].error.code == grpc.StatusCode.PERMISSION_DENIED.value[0]


def test_call_logs_contain_the_caller(guarded: ServiceProcess, unique: str) -> None:
    """The log line of a call has its caller's name, also for a rejected call, which is logged as a warning."""
    claim(guarded, BOX, unique)
    refused(lambda: claim(guarded, REFUNDS, unique))
    wait_until(lambda: len(guarded.events("call_finished")) == 2, what="the log lines")
    assert [(line["caller"], line["level"]) for line in guarded.events("call_finished")] == [
        ("lucky-box", "info"),
        ("refunds", "warning"),
    ]


def test_sighup_reloads_tokens_and_callers(guarded: ServiceProcess, files: tuple[Path, Path], unique: str) -> None:
    """After SIGHUP a revoked token is rejected and a new one works; an invalid file keeps the previous tokens."""
    tokens, policies = files
    fresh = "fresh-token-01234567"
    tokens.write_text(f'lucky-box = "{fresh}"')
    policies.write_text("[callers.lucky-box]")
    guarded.signal(signal.SIGHUP)
    wait_until(lambda: len(guarded.events("policy_loaded")) == 2, what="the new policies")
    assert guarded.events("tokens_loaded")[0]["tokens"] == 1
    assert error_fields(refused(lambda: claim(guarded, BOX, unique))) == UNKNOWN
    assert claim(guarded, fresh, unique, "refunds") == CLAIMED
    tokens.write_text("lucky-box = ")
    guarded.signal(signal.SIGHUP)
    wait_until(lambda: guarded.events("tokens_reload_failed"), what="the tokens_reload_failed event")
    assert claim(guarded, fresh, f"{unique}-2") == CLAIMED


def test_health_needs_no_token(shared_guarded: ServiceProcess) -> None:
    """Health checks succeed without a token."""
    checked = run_command("healthcheck", "--target", shared_guarded.target)
    assert (checked.returncode, checked.stdout) == (0, "SERVING\n")


def test_without_caller_policies_every_authenticated_caller_is_allowed(
    start_service: Start, redis_server: RedisProcess, files: tuple[Path, Path], unique: str
) -> None:
    """A valid token may use every namespace if the policy file has no `callers` table."""
    service = start_service("--store-url", redis_server.url, "--auth-tokens", str(files[0]))
    assert claim(service, REFUNDS, unique, "pay") == CLAIMED
    assert error_fields(refused(lambda: claim(service, None, unique))) == UNKNOWN


def test_a_caller_missing_from_the_policy_file_is_rejected(
    guarded: ServiceProcess, files: tuple[Path, Path], unique: str
) -> None:
    """If the policy file has callers, a valid token of any other caller is rejected."""
    files[0].write_text(TOKENS + 'stranger = "strangers-token-0123"')
    guarded.signal(signal.SIGHUP)
    wait_until(lambda: guarded.events("tokens_loaded"), what="the tokens")
    answer = refused(lambda: claim(guarded, "strangers-token-0123", unique))
    assert error_fields(answer) == NOT_ALLOWED
    assert "'stranger' is not in the policy file" in answer.message


def test_caller_policies_require_authentication(files: tuple[Path, Path]) -> None:
    """A server without authentication does not start with a policy file that has callers."""
    ended = run_command("serve", "--listen", "127.0.0.1:0", "--policy-file", str(files[1]))
    assert ended.returncode == 2
    assert "set DEDUP_TLS_CLIENT_CA or DEDUP_AUTH_TOKENS" in ended.stderr


# Common name and alternative names of a certificate, a namespace, and the answer to a claim in it.
CERTIFICATES = [
    (("", "spiffe://example.org/ns/pay"), "pay", CLAIMED),
    (("", "api.example", "spiffe://example.org/ns/pay"), "pay", CLAIMED),
    (("", "spiffe://example.org/ns/pay"), "other", NOT_ALLOWED),
    (("old-style",), "other", CLAIMED),
    # The common name is ignored if there are alternative names.
    (("old-style", "api.example"), "other", NOT_ALLOWED),
    (("",), "pay", UNKNOWN),
]


def test_certificates_name_callers(start_grpcio: Start, tmp_path: Path) -> None:
    """A client certificate identifies the caller by an alternative name, or by the common name if it has none."""
    policies = tmp_path / "policies.toml"
    policies.write_text('[callers."spiffe://example.org/ns/pay"]\nnamespaces = ["pay"]\n[callers.old-style]\n')
    authority = Authority(tmp_path)
    cert, key = authority.server_files()
    service = start_grpcio(
        *("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.file)),
        *("--policy-file", str(policies), "--store-url", f"sqlite://{tmp_path / 'claims.db'}"),
    )
    for number, ((common_name, *alternatives), namespace, outcome) in enumerate(CERTIFICATES):
        files = authority.caller_files(f"caller-{number}", *alternatives, common_name=common_name)
        request = Claim(transaction_id=f"order-{number}", namespace=namespace)
        with grpc.secure_channel(service.target, authority.credentials(files)) as channel:
            claim_it = partial(dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction, request, timeout=10)
            answer = claim_it().outcome if outcome == CLAIMED else error_fields(refused(claim_it))
        assert answer == outcome, (common_name, alternatives, namespace)


def test_a_token_takes_precedence_over_a_certificate(
    start_grpcio: Start, tmp_path: Path, files: tuple[Path, Path], unique: str
) -> None:
    """With both enabled, a call with a token has the token's caller, and one without has the certificate's."""
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
        assert error_fields(refused(lambda: stub.ClaimTransaction(pay, timeout=10))) == NOT_ALLOWED
        assert error_fields(refused(lambda: stub.ClaimTransaction(own, timeout=10, metadata=token))) == NOT_ALLOWED
        wrong = (("authorization", "Bearer wrong-token-01234"),)
        assert error_fields(refused(lambda: stub.ClaimTransaction(own, timeout=10, metadata=wrong))) == UNKNOWN


def test_every_worker_authenticates_callers(
    start_service: Start, redis_server: RedisProcess, files: tuple[Path, Path], unique: str
) -> None:
    """Every worker requires tokens, reloads them on one SIGHUP, and serves health on the shared address."""
    tokens = files[0]
    arguments = ("--workers", "2", "--store-url", redis_server.url, "--auth-tokens", str(tokens))
    service = start_service(*arguments, "--health-listen", f"127.0.0.1:{free_port()}")
    request = Claim(transaction_id=unique)
    for channel in (channels := [channel_to(service) for _ in range(8)]):
        call = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction
        assert error_fields(refused(lambda call=call: call(request, timeout=10))) == UNKNOWN  # type: ignore[misc]
        assert call(request, timeout=10, metadata=(("authorization", f"Bearer {BOX}"),)).outcome
    tokens.write_text('lucky-box = "fresh-token-01234567"')
    service.signal(signal.SIGHUP)
    wait_until(lambda: len(service.events("tokens_loaded")) == 2, what="the tokens in both workers")
    for channel in channels:
        call = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction
        header = (("authorization", f"Bearer {BOX}"),)
        answer = refused(lambda call=call, header=header: call(request, timeout=10, metadata=header))  # type: ignore[misc]
        assert error_fields(answer) == UNKNOWN
        channel.close()
    assert len({tuple(line["addresses"]) for line in service.events("health_listener_started")}) == 1
    health = service.events("health_listener_started")[0]["addresses"][0]
    assert run_command("healthcheck", "--target", health, "--service", "liveness").stdout == "SERVING\n"


def test_workers_cannot_share_a_socket_for_health() -> None:
    """As for claims, the error names the setting."""
    ended = run_command("serve", "--workers", "2", "--health-listen", "unix:///run/dedup-health.sock")
    assert (ended.returncode, "DEDUP_HEALTH_LISTEN has unix:///run" in ended.stderr) == (2, True)
