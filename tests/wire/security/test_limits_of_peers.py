"""Per-peer limits: message and metadata size, connections, ping rate, and keepalive."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from hyperframe.frame import PingFrame

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.api.decoding import MAX_BATCH
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
    """A batch of 1,000 claims with every field at its maximum length is below the message limit."""
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
    """A result of the largest size that an operator can configure is below the message limit."""
    service = start_service("--store-url", f"sqlite://{tmp_path / 'c.db'}", "--max-result-bytes", "1048576")
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        token = stub.ClaimTransaction(Claim(transaction_id=unique)).claim_token
        reply = stub.CompleteTransaction(
            dedup_pb2.CompleteTransactionRequest(transaction_id=unique, claim_token=token, result=bytes(1_048_576))
        )
    assert reply.outcome == dedup_pb2.COMPLETE_OUTCOME_COMPLETED


def test_messages_over_2_mib_are_rejected(stub: dedup_pb2_grpc.DedupServiceStub, unique: str) -> None:
    """A message over 2 MiB is rejected before it is read.

    Protection: grpc.max_receive_message_length.
    """
    request = dedup_pb2.CompleteTransactionRequest(transaction_id=unique, result=bytes(engines.MAX_MESSAGE_BYTES))
    assert refused(lambda: stub.CompleteTransaction(request)).code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_metadata_over_8_kib_is_always_rejected(service: ServiceProcess, unique: str) -> None:
    """Metadata over 8 KiB is rejected every time, and smaller metadata is served every time.

    Protection: grpcio's soft and hard limits are equal. Between two different limits it rejects at random.
    """
    with service.channel() as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        for number in range(20):
            request = Claim(transaction_id=f"{unique}-{number}")
            stub.ClaimTransaction(request, metadata=(("x-much", "x" * 7_000),))
            with pytest.raises(grpc.RpcError):
                stub.ClaimTransaction(request, metadata=(("x-much", "x" * 9_000),))


def test_connections_over_the_limit_are_closed(start_grpcio: Start, tmp_path: Path, unique: str) -> None:
    """A connection over the limit is closed; a new one is accepted after another has closed.

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


def test_the_native_engine_rejects_a_connection_limit(tmp_path: Path) -> None:
    """The native engine cannot limit connections, so it does not start with DEDUP_MAX_CONNECTIONS."""
    arguments = ("--engine", "native", "--max-connections", "3", "--store-url", f"sqlite://{tmp_path / 'c.db'}")
    ended = run_command("serve", "--listen", "127.0.0.1:0", *arguments)
    assert ended.returncode == 1
    assert "unset DEDUP_MAX_CONNECTIONS, or set DEDUP_ENGINE=grpcio" in ended.stderr


def test_a_peer_that_pings_too_often_is_disconnected(start_grpcio: Start, tmp_path: Path) -> None:
    """100 pings at once close the connection with ENHANCE_YOUR_CALM.

    Protection: grpcio's ping strikes, with the configured minimum interval.
    """
    service = start_grpcio("--store-url", f"sqlite://{tmp_path / 'c.db'}")
    with HostilePeer(service.target).shake_hands() as peer:
        peer.send(*(PingFrame(0, opaque_data=number.to_bytes(8)).serialize() for number in range(100)))
        assert "goaway 11" in peer.answers(2.0)


@asynccontextmanager
async def running_engine(name: EngineName) -> AsyncIterator[str]:
    """Yield the address of an engine that serves no rpc."""
    engine = engines.make_engine(name, lambda _: None, engines.EngineOptions(max_streams=10))
    address = engine.listen("127.0.0.1:0")
    await engine.start()
    try:
        yield address
    finally:
        await engine.stop(None)


async def test_pings_at_the_allowed_rate_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that pings no more often than the minimum interval keeps its idle connection.

    Protection: pings without calls are allowed.
    """
    monkeypatch.setattr(engines, "MIN_PING_INTERVAL_MS", 1)
    async with running_engine("grpcio") as address:
        with await asyncio.to_thread(lambda: HostilePeer(address).shake_hands()) as peer:
            for number in range(10):
                peer.send(PingFrame(0, opaque_data=number.to_bytes(8)).serialize())
                assert "goaway 11" not in await asyncio.to_thread(peer.answers, 0.05)


async def test_an_unresponsive_peer_is_disconnected(monkeypatch: pytest.MonkeyPatch, engine: EngineName) -> None:
    """The server closes the connection of a peer that does not answer its pings.

    Protection: the server's keepalive.
    """
    monkeypatch.setattr(engines, "KEEPALIVE_MS", 200)
    monkeypatch.setattr(engines, "KEEPALIVE_TIMEOUT_MS", 200)
    async with running_engine(engine) as address:
        with await asyncio.to_thread(lambda: HostilePeer(address).shake_hands()) as peer:

            async def closed() -> bool:
                return await asyncio.to_thread(_is_closed, peer)

            await eventually(closed, what="the connection to close")


def _is_closed(peer: HostilePeer) -> bool:
    peer.socket.settimeout(0.2)
    try:
        return peer.socket.recv(65_536) == b""
    except TimeoutError:
        return False
    except OSError:
        return True
