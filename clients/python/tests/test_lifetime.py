"""Closed clients, a second event loop, and several servers, for both clients."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from dedup import CallFailed, Client, ClientClosed, DedupError, Unavailable, WrongEventLoop, aio
from dedup.channels import channel_options
from dedup.testing import AsyncFakeClient, FakeClient
from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess


def test_a_closed_client_stays_closed(target: str, unique: str) -> None:
    """Every later call raises ClientClosed, which is never an outage. Closing again does nothing."""
    clients: list[Client] = [Client(target, on_unavailable="allow"), FakeClient(on_unavailable="allow")]
    for client in clients:
        claim = client.claim(unique)
        client.close()
        client.close()
        for call in (
            partial(client.claim, unique),
            partial(client.get, unique),
            claim.complete,
            claim.release,
            claim.extend,
        ):
            with pytest.raises(ClientClosed, match="the client was closed") as caught:
                call()
            assert caught.value.applied == "no"
            assert isinstance(caught.value, DedupError)
            assert not isinstance(caught.value, Unavailable)


async def test_a_closed_asynchronous_client_stays_closed(target: str, unique: str) -> None:
    """The same. A client that was closed before its first call opens no channel."""
    for client in (aio.Client(target, on_unavailable="allow"), AsyncFakeClient(on_unavailable="allow")):
        claim = await client.claim(unique)
        await client.close()
        await client.close()
        for call in (
            client.claim(unique)._claiming,
            client.get(unique),
            claim.complete(),
            claim.release(),
            claim.extend(),
        ):
            with pytest.raises(ClientClosed):
                await call
    unused = aio.Client(target)
    await unused.close()
    with pytest.raises(ClientClosed):
        await unused.get(unique)


async def test_a_call_in_flight_ends_with_its_client(
    redis_server: RedisProcess, start_service: Any, unique: str
) -> None:
    """It may have been applied. The task itself was not cancelled."""
    service = await asyncio.to_thread(start_service, "--store-url", redis_server.url)
    client = aio.Client(service.target, timeout=20, attempt_timeout=20)
    await client.claim(unique)
    waiting = asyncio.ensure_future(client.claim(unique, wait=30)._claiming)
    await asyncio.sleep(0)
    await client.get(unique)
    await client.close()
    with pytest.raises(ClientClosed) as caught:
        await waiting
    assert caught.value.applied == "unknown"


def test_a_second_event_loop_is_refused(target: str, unique: str) -> None:
    """It would wait for the first one for ever. Closing the client there does not hang."""
    client = aio.Client(target, timeout=20)

    async def claim(name: str) -> aio.Claim:
        return await client.claim(name)

    first = asyncio.run(claim(unique))

    async def again() -> None:
        for call in (claim(f"{unique}-2"), client.get(unique), first.complete()):
            with pytest.raises(WrongEventLoop, match="one client for each event loop"):
                await call
        await client.close()

    asyncio.run(again())
    assert issubclass(WrongEventLoop, DedupError)
    assert not issubclass(WrongEventLoop, CallFailed)


def test_calls_are_spread_over_all_servers(
    redis_server: RedisProcess, start_service: Callable[..., ServiceProcess], unique: str
) -> None:
    """`round_robin` is the default. When one server stops, the other one serves."""
    servers = [start_service("--store-url", redis_server.url) for _ in range(2)]
    target = "ipv4:" + ",".join(server.target for server in servers)
    with Client(target, timeout=30) as client:
        numbers = iter(range(10_000))

        def both_served() -> bool:
            client.claim(f"{unique}-{next(numbers)}")
            return all(server.events("call_finished") for server in servers)

        wait_until(both_served, 30, "calls at both servers")
        servers[0].kill()
        for _ in range(20):
            client.claim(f"{unique}-{next(numbers)}")


def test_another_balancing_can_be_chosen() -> None:
    """By the options of the channel."""
    config = '{"loadBalancingConfig": [{"pick_first": {}}]}'
    assert "round_robin" in str(dict(channel_options(()))["grpc.service_config"])
    assert dict(channel_options([("grpc.service_config", config)]))["grpc.service_config"] == config
