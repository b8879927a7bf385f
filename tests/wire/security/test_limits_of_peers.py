"""What one peer may send and keep open: messages, metadata, connections, pings and silence."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from hyperframe.frame import PingFrame

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.api.servicer import MAX_BATCH
from dedup_service.claims.limits import MAX_CLAIMANT_BYTES, MAX_FINGERPRINT_BYTES, MAX_TRANSACTION_ID_BYTES
from dedup_service.config.settings import EngineName
from dedup_service.server import engines
from tests.support.errors import refused
from tests.support.hostile_peer import HostilePeer
from tests.support.polling import eventually
from tests.support.processes import ServiceProcess, run_command

pytestmark = pytest.mark.every_engine

Claim = dedup_pb2.ClaimTransactionRequest
Start = Callable[..., ServiceProcess]
_LONGEST = MAX_TRANSACTION_ID_BYTES


def test_the_largest_batch_is_served(stub: dedup_pb2_grpc.DedupServiceStub, unique: str) -> None:
    """A batch of 1,000 claims with every field as long as the contract allows is below the limit of a message."""
    requests = [
        Claim(
            transaction_id=f"{unique}-{number:04}".ljust(_LONGEST, "x"),
            namespace="n" * 63,
            claim_token=f"{number:064}",
            claimant="c" * MAX_CLAIMANT_BYTES,
            payload_fingerprint=bytes(MAX_FINGERPRINT_BYTES),
        )
        for number in range(MAX_BATCH)
    ]
    reply = stub.BatchClaimTransactions(dedup_pb2.BatchClaimTransactionsRequest(requests=requests), timeout=60)
    assert {entry.response.outcome for entry in reply.entries} == {dedup_pb2.CLAIM_OUTCOME_CLAIMED}


def test_the_largest_result_is_served(start_service: Start, tmp_path: Path, unique: str) -> None:
    """A result of the largest size that an operator may allow is below the limit of a message."""
    service = start_service("--store-url", f"sqlite://{tmp_path / 'c.db'}", "--max-result-bytes", "1048576")
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        token = stub.ClaimTransaction(Claim(transaction_id=unique)).claim_token
        reply = stub.CompleteTransaction(
            dedup_pb2.CompleteTransactionRequest(transaction_id=unique, claim_token=token, result=bytes(1_048_576))
        )
    assert reply.outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED


def test_a_longer_message_is_refused(stub: dedup_pb2_grpc.DedupServiceStub, unique: str) -> None:
    """A message of more than 2 MiB is refused before it is read. Protection: grpc.max_receive_message_length."""
    request = dedup_pb2.CompleteTransactionRequest(transaction_id=unique, result=bytes(engines.MAX_MESSAGE_BYTES))
    assert refused(lambda: stub.CompleteTransaction(request)).code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_more_metadata_is_refused_always(service: ServiceProcess, unique: str) -> None:
    """Metadata of more than 8 KiB is refused each time, and less is served each time.

    Protection: both limits of grpcio are one; between its own two it refuses at random.
    """
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        for number in range(20):
            request = Claim(transaction_id=f"{unique}-{number}")
            stub.ClaimTransaction(request, metadata=(("x-much", "x" * 7_000),))
            with pytest.raises(grpc.RpcError):
                stub.ClaimTransaction(request, metadata=(("x-much", "x" * 9_000),))


def test_no_more_connections_than_the_limit(start_grpcio: Start, tmp_path: Path, unique: str) -> None:
    """A connection beyond the limit is closed, and one is taken again when another has gone.

    Protection: grpc.max_allowed_incoming_connections.
    """
    service = start_grpcio("--store-url", f"sqlite://{tmp_path / 'c.db'}", "--max-connections", "3")
    peers = [HostilePeer(service.target).shake_hands() for _ in range(3)]
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        answer = refused(lambda: stub.ClaimTransaction(Claim(transaction_id=unique)))
        assert answer.code is grpc.StatusCode.UNAVAILABLE
        for peer in peers:
            peer.socket.close()
        assert stub.ClaimTransaction(Claim(transaction_id=unique), timeout=30, wait_for_ready=True).outcome


def test_a_limit_that_the_engine_cannot_hold_is_refused(tmp_path: Path) -> None:
    """The native engine does not start with a limit on connections that it would ignore."""
    arguments = ("--engine", "native", "--max-connections", "3", "--store-url", f"sqlite://{tmp_path / 'c.db'}")
    ended = run_command("serve", "--listen", "127.0.0.1:0", *arguments)
    assert ended.returncode == 1
    assert "unset DEDUP_MAX_CONNECTIONS, or set DEDUP_ENGINE=grpcio" in ended.stderr


def test_a_peer_that_pings_too_often_is_hung_up_on(start_grpcio: Start, tmp_path: Path) -> None:
    """100 pings at once end the connection with ENHANCE_YOUR_CALM. Protection: grpcio's strikes, at our interval."""
    service = start_grpcio("--store-url", f"sqlite://{tmp_path / 'c.db'}")
    with HostilePeer(service.target).shake_hands() as peer:
        peer.send(*(PingFrame(0, opaque_data=number.to_bytes(8)).serialize() for number in range(100)))
        assert "goaway 11" in peer.answers(2.0)


@asynccontextmanager
async def an_engine(name: EngineName) -> AsyncIterator[str]:
    """Yield the address of an engine without any service."""
    engine = engines.make_engine(name, lambda _: None, engines.EngineOptions(max_streams=10))
    address = engine.listen("127.0.0.1:0")
    await engine.start()
    try:
        yield address
    finally:
        await engine.stop(None)


async def test_a_patient_ping_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks no oftener than the interval keeps an idle connection. Protection: pings are allowed without calls."""
    monkeypatch.setattr(engines, "MIN_PING_INTERVAL_MS", 1)
    async with an_engine("grpcio") as address:
        with await asyncio.to_thread(lambda: HostilePeer(address).shake_hands()) as peer:
            for number in range(10):
                peer.send(PingFrame(0, opaque_data=number.to_bytes(8)).serialize())
                assert "goaway 11" not in await asyncio.to_thread(peer.answers, 0.05)


async def test_a_peer_that_has_gone_silently_is_noticed(monkeypatch: pytest.MonkeyPatch, engine: EngineName) -> None:
    """A peer that answers no ping of the server is hung up on. Protection: the server's own keepalive."""
    monkeypatch.setattr(engines, "KEEPALIVE_MS", 200)
    monkeypatch.setattr(engines, "KEEPALIVE_TIMEOUT_MS", 200)
    async with an_engine(engine) as address:
        with await asyncio.to_thread(lambda: HostilePeer(address).shake_hands()) as peer:

            async def hung_up() -> bool:
                return await asyncio.to_thread(_is_closed, peer)

            await eventually(hung_up, what="the end of the connection")


def _is_closed(peer: HostilePeer) -> bool:
    peer.socket.settimeout(0.2)
    try:
        return peer.socket.recv(65_536) == b""
    except TimeoutError:
        return False
    except OSError:
        return True
