"""Namespace policies over real gRPC: lifetimes, unknown namespaces, shadow mode, and reloads."""

import asyncio
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.errors import refused
from tests.support.polling import eventually, wait_until
from tests.support.processes import RedisProcess, ServiceProcess, run_command

StartService = Callable[..., ServiceProcess]
StartWithPolicies = Callable[[str], ServiceProcess]
Claim = dedup_pb2.ClaimTransactionRequest
CLAIMED = dedup_pb2.CLAIM_OUTCOME_CLAIMED
DUPLICATE = dedup_pb2.CLAIM_OUTCOME_DUPLICATE
MISMATCH = dedup_pb2.CLAIM_OUTCOME_PAYLOAD_MISMATCH

POLICIES = """
[namespaces.short]
default_ttl = "2m"
max_ttl = "1h"
retention = "30m"

[namespaces.trial]
mode = "shadow"
"""


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    """The path of this test's policy file."""
    return tmp_path / "policies.toml"


@pytest.fixture
def start_with(start_service: StartService, redis_server: RedisProcess, policy_file: Path) -> StartWithPolicies:
    """Starts the service over Redis with the given policy file content."""

    def start(text: str) -> ServiceProcess:
        policy_file.write_text(text)
        return start_service("--store-url", redis_server.url, "--policy-file", str(policy_file))

    return start


def call_method(service: ServiceProcess, method: str, request: Any) -> Any:
    """Call one method over a new channel."""
    with service.channel() as channel:
        return getattr(dedup_pb2_grpc.DedupServiceStub(channel), method)(request)


def claim(service: ServiceProcess, transaction_id: str, namespace: str = "", **fields: Any) -> Any:
    """Claim and return the reply."""
    return call_method(service, "ClaimTransaction", Claim(transaction_id=transaction_id, namespace=namespace, **fields))


def send_sighup(service: ServiceProcess, event: str) -> dict[str, Any]:
    """Send SIGHUP and return the next log line of this event."""
    before = len(service.events(event))
    service.signal(signal.SIGHUP)
    wait_until(lambda: len(service.events(event)) > before, what=event)
    return service.events(event)[before]


def lifetime_ms(transaction: dedup_pb2.Transaction, begin: str) -> int:
    """Return the milliseconds from the timestamp field `begin` to `expire_time`."""
    start: int = getattr(transaction, begin).ToMilliseconds()
    return transaction.expire_time.ToMilliseconds() - start


@pytest.mark.parametrize(("namespace", "ms"), [("short", 120_000), ("", 60_000), ("other", 60_000)])
def test_a_namespace_has_its_own_default_ttl(
    start_with: StartWithPolicies, redis_client: redis.Redis, unique: str, namespace: str, ms: int
) -> None:
    """A claim without a ttl gets the default of its namespace, in the reply and in the store."""
    reply = claim(start_with(POLICIES), unique, namespace)
    assert lifetime_ms(reply.transaction, "claim_time") == ms
    assert ms - 20_000 < redis_client.pttl(f"dedup:{namespace or 'default'}:{unique}") <= ms


def test_a_namespace_has_its_own_maximum_ttl(start_with: StartWithPolicies, unique: str) -> None:
    """A ttl over one namespace's maximum is valid in another; the error names the namespace's own maximum."""
    service = start_with(POLICIES)
    request = Claim(transaction_id=unique, namespace="short")
    request.ttl.FromSeconds(3_601)
    answer = refused(lambda: call_method(service, "ClaimTransaction", request))
    assert (answer.code, answer.applied) == (grpc.StatusCode.INVALID_ARGUMENT, "no")
    assert answer.violations == {"ttl": "is longer than the maximum of 1h"}
    request.namespace = "other"
    assert call_method(service, "ClaimTransaction", request).outcome == CLAIMED


@pytest.mark.parametrize(("namespace", "ms"), [("short", 1_800_000), ("other", 86_400_000)])
def test_a_namespace_has_its_own_retention(
    start_with: StartWithPolicies, redis_client: redis.Redis, unique: str, namespace: str, ms: int
) -> None:
    """A completed transaction is kept for its namespace's retention, by default one day."""
    service = start_with(POLICIES)
    token = claim(service, unique, namespace).claim_token
    request = dedup_pb2.CompleteTransactionRequest(transaction_id=unique, namespace=namespace, claim_token=token)
    reply = call_method(service, "CompleteTransaction", request)
    assert reply.outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED
    assert lifetime_ms(reply.transaction, "completion_time") == ms
    assert ms - 20_000 < redis_client.pttl(f"dedup:{namespace}:{unique}") <= ms


def test_max_result_bytes_limits_the_result(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """A result one byte over DEDUP_MAX_RESULT_BYTES is rejected and leaves the claim unchanged."""
    service = start_service("--store-url", redis_server.url, "--max-result-bytes", "8")
    token = claim(service, unique).claim_token
    request = dedup_pb2.CompleteTransactionRequest(transaction_id=unique, claim_token=token, result=b"123456789")
    answer = refused(lambda: call_method(service, "CompleteTransaction", request))
    assert (answer.code, list(answer.violations)) == (grpc.StatusCode.INVALID_ARGUMENT, ["result"])
    request.result = b"12345678"
    assert call_method(service, "CompleteTransaction", request).outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED


@pytest.mark.parametrize("namespace", ["", "other"])
def test_unknown_namespaces_are_rejected(
    start_with: StartWithPolicies, redis_client: redis.Redis, unique: str, namespace: str
) -> None:
    """With `allow_unknown_namespaces = false` claims and look-ups in other namespaces fail and write nothing."""
    service = start_with("allow_unknown_namespaces = false\n" + POLICIES)
    name = namespace or "default"
    for method, request in (
        ("ClaimTransaction", Claim(transaction_id=unique, namespace=namespace)),
        ("GetTransaction", dedup_pb2.GetTransactionRequest(transaction_id=unique, namespace=namespace)),
    ):
        answer = refused(lambda method=method, request=request: call_method(service, method, request))  # type: ignore[misc]
        assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert list(answer.violations) == ["namespace"]
        assert f"'{name}' is not known here" in answer.violations["namespace"]
    assert list(redis_client.scan_iter(f"*{unique}*", count=1_000)) == []
    assert claim(service, unique, "short").outcome == CLAIMED


def test_shadow_mode_claims_and_marks_duplicates(
    start_with: StartWithPolicies, redis_client: redis.Redis, unique: str
) -> None:
    """In shadow mode a duplicate or mismatch receives a marked CLAIMED, and the holder's claim does not change.

    The reply carries the caller's own token: with the holder's token, it could complete the holder's work.
    """
    service = start_with(POLICIES)
    first = claim(service, unique, "trial", claimant="holder", payload_fingerprint=b"one")
    assert (first.outcome, first.shadow_duplicate) == (CLAIMED, False)
    stored = redis_client.get(f"dedup:trial:{unique}")
    tokens = [first.claim_token]
    for fields in ({}, {"claim_token": f"own-{unique}"}, {"payload_fingerprint": b"two"}):
        second = claim(service, unique, "trial", **fields)
        assert (second.outcome, second.shadow_duplicate, second.replayed) == (CLAIMED, True, False)
        assert second.transaction == first.transaction
        assert second.claim_token == fields.get("claim_token", second.claim_token)
        tokens.append(second.claim_token)
    assert all(len(token) >= 16 for token in tokens)
    assert len(set(tokens)) == len(tokens)
    for token in tokens[1:]:
        request = dedup_pb2.CompleteTransactionRequest(transaction_id=unique, namespace="trial", claim_token=token)
        assert call_method(service, "CompleteTransaction", request).outcome == dedup_pb2.COMPLETE_OUTCOME_NOT_HELD
    assert redis_client.get(f"dedup:trial:{unique}") == stored
    replay = claim(service, unique, "trial", claim_token=first.claim_token, payload_fingerprint=b"one")
    assert (replay.outcome, replay.replayed, replay.shadow_duplicate) == (CLAIMED, True, False)
    assert claim(service, f"{unique}-enforced").outcome == CLAIMED
    assert claim(service, f"{unique}-enforced").outcome == DUPLICATE
    assert send_sighup(service, "policy_loaded")["shadow_duplicates"] == {"trial": 3}
    assert service.stop() == 0
    assert service.events("server_stopped")[0]["shadow_duplicates"] == {"trial": 3}


def test_a_reload_ends_shadow_mode(start_with: StartWithPolicies, policy_file: Path, unique: str) -> None:
    """An edit and SIGHUP switch a namespace from shadow to enforce, also for existing claims."""
    service = start_with(POLICIES)
    claim(service, unique, "trial", payload_fingerprint=b"one")
    assert claim(service, unique, "trial").outcome == CLAIMED
    policy_file.write_text(POLICIES.replace('"shadow"', '"enforce"'))
    send_sighup(service, "policy_loaded")
    assert claim(service, unique, "trial").outcome == DUPLICATE
    assert claim(service, unique, "trial", payload_fingerprint=b"two").outcome == MISMATCH


async def test_a_policy_reload_drops_no_call(start_with: StartWithPolicies, policy_file: Path, unique: str) -> None:
    """SIGHUP under load applies the new file to later claims, and every call succeeds."""
    service = await asyncio.to_thread(start_with, POLICIES)
    applied = asyncio.Event()
    lives: list[int] = []

    async def caller(stub: "dedup_pb2_grpc.DedupServiceAsyncStub", number: int) -> None:
        for attempt in itertools.count():
            late = applied.is_set()
            reply = await stub.ClaimTransaction(
                Claim(transaction_id=f"{unique}-{number}-{attempt}", namespace="short"), timeout=20
            )
            assert reply.outcome == CLAIMED
            lives.append(lifetime_ms(reply.transaction, "claim_time"))
            if late:
                assert lives[-1] == 180_000
                return

    async with grpc.aio.insecure_channel(service.target) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        callers = [asyncio.create_task(caller(stub, number)) for number in range(16)]

        async def busy() -> bool:
            return len(lives) > 100

        await eventually(busy, what="load")
        await asyncio.to_thread(policy_file.write_text, POLICIES.replace('"2m"', '"3m"'))
        line = await asyncio.to_thread(send_sighup, service, "policy_loaded")
        applied.set()
        await asyncio.gather(*callers)
    assert set(lives) == {120_000, 180_000}
    assert {call["code"] for call in service.events("call_finished")} == {"OK"}
    assert (line["file"], line["namespaces"], line["allow_unknown_namespaces"], line["level"]) == (
        str(policy_file),
        ["short", "trial"],
        True,
        "info",
    )


def test_rapid_sighups_apply_the_last_file(start_with: StartWithPolicies, policy_file: Path, unique: str) -> None:
    """After many signals in quick succession the last file is in effect."""
    service = start_with(POLICIES)
    for seconds in range(1, 101):
        # Replace atomically, as editors and mounted volumes do, so that no read sees a partial file.
        fresh = policy_file.with_suffix(".new")
        fresh.write_text(f'[namespaces.short]\ndefault_ttl = "{seconds}s"\n')
        fresh.replace(policy_file)
        service.signal(signal.SIGHUP)
    attempts = itertools.count()

    def last_file_applies() -> bool:
        reply = claim(service, f"{unique}-{next(attempts)}", "short")
        return lifetime_ms(reply.transaction, "claim_time") == 100_000

    wait_until(last_file_applies, what="the last file")
    assert not service.events("policy_reload_failed")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ('[namespaces.short]\ndefault_ttl = "9d"\n', "namespace 'short': default_ttl (9d) is longer than max_ttl"),
        ("[namespaces", "is not valid TOML"),
        (None, "No such file or directory"),
    ],
)
def test_a_failed_reload_keeps_the_previous_policies(
    start_with: StartWithPolicies, policy_file: Path, unique: str, broken: str | None, words: str
) -> None:
    """SIGHUP with an invalid file changes nothing and logs the reason; a corrected file applies later."""
    service = start_with(POLICIES)
    if broken is None:
        policy_file.unlink()
    else:
        policy_file.write_text(broken)
    line = send_sighup(service, "policy_reload_failed")
    assert (line["level"], line["file"], words in line["message"]) == ("error", str(policy_file), True)
    assert lifetime_ms(claim(service, unique, "short").transaction, "claim_time") == 120_000
    assert len(service.events("policy_loaded")) == 1, "only the load at start-up"
    policy_file.write_text(POLICIES.replace('"2m"', '"4m"'))
    send_sighup(service, "policy_loaded")
    assert lifetime_ms(claim(service, f"{unique}-later", "short").transaction, "claim_time") == 240_000
    assert service.stop() == 0


def test_sighup_without_a_policy_file_is_harmless(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """SIGHUP to a service without a policy file logs one line, and the service keeps serving."""
    service = start_service("--store-url", redis_server.url)
    assert send_sighup(service, "policy_reload_skipped")["level"] == "info"
    assert claim(service, unique).outcome == CLAIMED
    assert not service.events("policy_loaded")
    assert service.stop() == 0
    assert service.events("server_stopped")[0]["shadow_duplicates"] == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[namespaces.pay]\nmode = "loud"\n', "namespace 'pay': mode is 'loud': write \"enforce\" or \"shadow\""),
        (None, "it cannot be read: No such file or directory"),
    ],
)
def test_an_invalid_policy_file_prevents_start_up(
    tmp_path: Path, policy_file: Path, text: str | None, words: str
) -> None:
    """A server with an invalid policy file exits with 2 and one sentence, before it opens its store."""
    if text is not None:
        policy_file.write_text(text)
    store = tmp_path / "claims.db"
    arguments = ("serve", "--listen", "127.0.0.1:0", "--store-url", f"sqlite://{store}")
    ended = run_command(*arguments, environment={"DEDUP_POLICY_FILE": str(policy_file)})
    assert ended.returncode == 2
    assert ended.stderr == f"dedup-service: the policy file '{policy_file}' is not usable: {words}\n"
    assert not os.path.lexists(store)


async def test_waiting_calls_are_answered_at_shutdown(
    start_service: StartService, redis_server: RedisProcess, unique: str
) -> None:
    """A waiting duplicate receives DUPLICATE when the shutdown starts, long before the grace period ends.

    Protection: the claim service closes together with admission.
    """
    service = await asyncio.to_thread(start_service, "--store-url", redis_server.url, "--shutdown-grace", "60s")
    async with grpc.aio.insecure_channel(service.target) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        assert (await stub.ClaimTransaction(Claim(transaction_id=unique))).outcome == CLAIMED
        request = Claim(transaction_id=unique, claimant="waits")
        request.wait.FromSeconds(50)
        waiting = stub.ClaimTransaction(request, timeout=55)
        # A second call on the same connection proves that the first one arrived.
        later = stub.GetTransaction(dedup_pb2.GetTransactionRequest(transaction_id=unique))
        assert (await later).transaction.transaction_id == unique
        assert not waiting.done()
        service.signal(signal.SIGTERM)
        reply = await asyncio.wait_for(waiting, timeout=20)
        assert (reply.outcome, reply.transaction.transaction_id) == (DUPLICATE, unique)
    assert await asyncio.to_thread(service.wait) == 0
