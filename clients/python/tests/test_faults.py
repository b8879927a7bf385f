"""Lost replies, a killed server, and an unavailable service: the live service behind a faulty proxy."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from dedup import CallFailed, Client, DuplicateTransaction, Unavailable, aio, call_metadata
from dedup.testing import AsyncFakeClient, FakeClient
from dedup.v1 import dedup_pb2
from tests.support.fault_proxy import FaultProxy
from tests.support.polling import eventually
from tests.support.processes import RedisProcess, ServiceProcess, free_port


@pytest.fixture
async def proxy(target: str) -> AsyncIterator[FaultProxy]:
    """A proxy between the client and the service."""
    async with FaultProxy(int(target.rpartition(":")[2])) as proxy:
        yield proxy


def address(proxy: FaultProxy) -> str:
    """Return the address of the proxy."""
    return proxy.url.removeprefix("redis://").removesuffix("/0")


@pytest.mark.parametrize("coalesce", [False, True])
async def test_a_call_with_a_lost_reply_is_retried(target: str, proxy: FaultProxy, unique: str, coalesce: bool) -> None:  # noqa: FBT001 - A parameter of pytest.
    """The claim is made and its reply lost. The retry receives CLAIMED again, as a replay."""
    async with (
        aio.Client(target) as direct,
        aio.Client(address(proxy), timeout=20, attempt_timeout=20, coalesce=coalesce) as client,
    ):
        await client.get(unique)
        proxy.hold_replies.clear()
        claiming = asyncio.ensure_future(client.claim(unique)._claiming)
        await eventually(lambda: direct.get(unique))
        proxy.drop_connections()
        proxy.hold_replies.set()
        claim = await claiming
        assert claim.replayed
        with pytest.raises(DuplicateTransaction):
            await direct.claim(unique)


async def test_a_blocking_call_with_a_lost_reply_is_retried(target: str, proxy: FaultProxy, unique: str) -> None:
    """The same for the blocking client."""
    with Client(target) as direct, Client(address(proxy), timeout=20, attempt_timeout=20) as client:
        await asyncio.to_thread(client.get, unique)
        proxy.hold_replies.clear()
        claiming = asyncio.ensure_future(asyncio.to_thread(client.claim, unique))
        await eventually(lambda: asyncio.to_thread(direct.get, unique))
        proxy.drop_connections()
        proxy.hold_replies.set()
        assert (await claiming).replayed


async def test_a_missing_reply_ends_only_the_attempt(target: str, proxy: FaultProxy, unique: str) -> None:
    """A silent connection costs one attempt, not the call. The next attempt is a replay."""
    async with aio.Client(target) as direct, aio.Client(address(proxy), timeout=20, attempt_timeout=0.3) as client:
        await client.get(unique)
        proxy.hold_replies.clear()
        claiming = asyncio.ensure_future(client.claim(unique)._claiming)
        await eventually(lambda: direct.get(unique))
        await asyncio.sleep(0.4)
        proxy.hold_replies.set()
        assert (await claiming).replayed


async def test_a_killed_and_restarted_server_grants_each_transaction_once(
    redis_server: RedisProcess, start_service: Callable[..., ServiceProcess], unique: str
) -> None:
    """Two callers claim each of 60 transactions while the server is killed and restarted."""
    port = free_port()
    options = ("--listen", f"127.0.0.1:{port}", "--store-url", redis_server.url)
    service = await asyncio.to_thread(start_service, *options)
    claimed: list[int] = []
    begun = asyncio.Event()

    async def caller(client: aio.Client) -> None:
        for number in range(60):
            try:
                await client.claim(f"{unique}-{number}")
            except DuplicateTransaction:
                continue
            claimed.append(number)
            if len(claimed) > 10:
                begun.set()

    async with aio.Client(f"127.0.0.1:{port}", timeout=40) as one, aio.Client(f"127.0.0.1:{port}", timeout=40) as two:
        callers = asyncio.gather(caller(one), caller(two))
        await begun.wait()
        await asyncio.to_thread(service.kill)
        await asyncio.to_thread(start_service, *options)
        await callers
    assert sorted(claimed) == list(range(60))


async def test_an_unreachable_service_denies(unique: str) -> None:
    """By default there is no claim without an answer. Nothing was sent, so nothing was applied."""
    codes = set()
    for target in (f"127.0.0.1:{free_port()}", f"unix:///tmp/{unique}", "no-such-host.invalid:1"):
        with Client(target, timeout=2) as client, pytest.raises(Unavailable) as caught:
            client.claim(unique)
        assert (caught.value.code.name, caught.value.applied, caught.value.reason) == ("UNAVAILABLE", "no", "")
        async with aio.Client(target, timeout=2) as waiting:
            with pytest.raises(Unavailable) as caught:
                await waiting.claim(unique)
        codes.add(caught.value.code.name)
        # A loaded machine may reach the deadline before the refusal is heard.
        assert caught.value.applied == ("no" if caught.value.code.name == "UNAVAILABLE" else "unknown")
    assert "UNAVAILABLE" in codes


async def test_an_unreachable_service_allows_work_if_configured(unique: str, caplog: pytest.LogCaptureFixture) -> None:
    """The claim is marked and logged as a warning. Completing, releasing and extending it do nothing."""
    target = f"127.0.0.1:{free_port()}"
    with caplog.at_level(logging.WARNING, "dedup"), Client(target, timeout=0.3, on_unavailable="allow") as client:
        with client.claim(unique) as claim:
            assert claim.fail_open is True
            assert (claim.transaction, claim.extend(60), claim.complete(b"x")) == (None, None, None)
            claim.release()
        with pytest.raises(ZeroDivisionError), client.claim(unique):
            raise ZeroDivisionError
        with pytest.raises(Unavailable):
            client.get(unique)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    async with aio.Client(target, timeout=0.3, on_unavailable="allow") as waiting, waiting.claim(unique) as held:
        assert held.fail_open is True
        assert await held.extend(60) is None


def test_on_unavailable_has_two_values() -> None:
    """Any other value is refused."""
    with pytest.raises(ValueError, match="on_unavailable"):
        FakeClient(on_unavailable="open")  # type: ignore[arg-type]


async def test_only_an_outage_allows_work(unique: str) -> None:
    """An invalid request or a duplicate never does."""
    client = AsyncFakeClient(on_unavailable="allow")
    await client.claim(unique)
    with pytest.raises(DuplicateTransaction):
        await client.claim(unique)
    with pytest.raises(CallFailed):
        await client.claim("")


def test_the_fake_loses_replies_and_recovers(unique: str) -> None:
    """A lost claim is replayed, a lost release does not raise, and an outage ends with the budget."""
    client = FakeClient()
    client.service.lose_replies(2)
    claim = client.claim(unique)
    assert claim.replayed
    attempts = [request for method, request in client.service.calls if method == "ClaimTransaction"]
    assert len(attempts) == 3
    assert (
        len({request.claim_token for request in attempts if isinstance(request, dedup_pb2.ClaimTransactionRequest)})
        == 1
    )
    client.service.lose_replies()
    claim.release()
    client.service.unavailable = True
    with pytest.raises(Unavailable) as caught:
        client.claim(unique)
    assert (caught.value.reason, caught.value.applied) == ("STORE_UNREACHABLE", "no")


def test_a_failed_release_does_not_hide_the_error(unique: str, caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets the error of the work, and the claim expires."""
    client = FakeClient()

    def work() -> None:
        with client.claim(unique, release_on=(ZeroDivisionError,)):
            client.service.unavailable = True
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert "could not end the claim" in caplog.text


def test_a_unix_socket_is_a_target(tmp_path: Path, start_service: Callable[..., ServiceProcess], unique: str) -> None:
    """The usual address of a sidecar."""
    socket = f"unix://{tmp_path / 's'}"
    start_service("--listen", socket, "--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    with Client(socket) as client:
        assert not client.claim(unique).replayed


def test_grpc_itself_never_retries() -> None:
    """A caller's channel options cannot enable its retries, because gRPC does not know the budget."""
    options: Any = [("grpc.enable_retries", 1), ("grpc.max_receive_message_length", 1)]
    from dedup.channels import channel_options  # noqa: PLC0415 - Only this test needs it.

    assert dict(channel_options(options))["grpc.enable_retries"] == 0
    assert dict(channel_options(options))["grpc.max_receive_message_length"] == 1


async def test_calls_send_the_metadata_of_their_block(
    tmp_path: Path, start_service: Callable[..., ServiceProcess], unique: str
) -> None:
    """The service logs each call under the correlation id of its block, for both clients."""
    service = start_service("--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    with Client(service.target) as client, call_metadata(("x-correlation-id", f"{unique}-sync")):
        client.claim(f"{unique}-1").release()
    async with aio.Client(service.target) as client:
        with call_metadata(("x-correlation-id", f"{unique}-async")):
            await (await client.claim(f"{unique}-2")).release()
        await client.claim(f"{unique}-3")
    await eventually(lambda: _are(len(service.events("call_finished")), 5), what="the log")
    ids = [line["correlation_id"] for line in service.events("call_finished")]
    assert ids[:4] == [f"{unique}-sync"] * 2 + [f"{unique}-async"] * 2
    assert unique not in ids[4]


async def _are(number: int, expected: int) -> bool:
    return number == expected
