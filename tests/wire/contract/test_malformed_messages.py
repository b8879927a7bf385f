"""Malformed messages to every rpc of a live service over Redis: each gets a readable error and changes nothing."""

import gzip
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import pytest
import redis
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.config.settings import EngineName
from tests.support import malformed
from tests.support.errors import RefusedCall, refused
from tests.support.hostile_peer import HostilePeer, data, grpc_message
from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess

pytestmark = pytest.mark.every_engine

TOKEN = "token-of-sixteen"
TTL = Duration(seconds=50)
SEED = 20261123
DAMAGED = 150
# The only allowed error statuses, from the service or from gRPC's own parser.
REFUSALS = {"status 3", "status 8", "status 12", "status 13"}
# Error messages must not reveal the service's internals.
INTERNALS = ("Traceback", "Exception", "<class", "DecodeError", "google.", "dedup_service", ".py", "0x")

Claim = dedup_pb2.ClaimTransactionRequest
GOOD: dict[str, Callable[[str], Message]] = {
    "ClaimTransaction": lambda u: Claim(transaction_id=u, claim_token=TOKEN, ttl=TTL, claimant="é"),
    "CompleteTransaction": lambda u: dedup_pb2.CompleteTransactionRequest(
        transaction_id=u, claim_token=TOKEN, result=b"done", ttl=TTL
    ),
    "ReleaseTransaction": lambda u: dedup_pb2.ReleaseTransactionRequest(transaction_id=u, claim_token=TOKEN),
    "ExtendTransaction": lambda u: dedup_pb2.ExtendTransactionRequest(transaction_id=u, claim_token=TOKEN, ttl=TTL),
    "GetTransaction": lambda u: dedup_pb2.GetTransactionRequest(transaction_id=u, namespace="default"),
    "BatchClaimTransactions": lambda u: dedup_pb2.BatchClaimTransactionsRequest(
        requests=[Claim(transaction_id=u, claim_token=TOKEN), Claim(transaction_id=f"{u}-2", claim_token=TOKEN)]
    ),
}
"""A valid request of each rpc about one transaction."""

CLAIMS = ("ClaimTransaction", "BatchClaimTransactions")
BROKEN = [(rpc, case) for rpc in GOOD for case in malformed.broken(GOOD[rpc]("x"))]
ODD = [(rpc, case) for rpc in GOOD for case in malformed.odd(GOOD[rpc]("x"))]


@pytest.fixture(scope="module")
def own_service(engine: EngineName, redis_server: RedisProcess) -> Iterator[ServiceProcess]:
    """A service for this module; teardown fails if it logged an error or does not exit with 0."""
    process = ServiceProcess("--engine", engine, "--store-url", redis_server.url).start()
    yield process
    assert process.stop() == 0
    assert not [line for line in process.logs if line["level"] == "error"]


@pytest.fixture
def channel(own_service: ServiceProcess) -> Iterator[grpc.Channel]:
    """A channel to this module's service."""
    with own_service.channel() as opened:
        yield opened


def path_of(rpc: str) -> str:
    """Return the HTTP/2 path of an rpc."""
    return f"/dedup.v1.DedupService/{rpc}"


def send(channel: grpc.Channel, rpc: str, raw: bytes) -> bytes:
    """Call an rpc with raw bytes and return the raw reply."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path_of(rpc))
    return call(raw, timeout=20)


def claim_first(channel: grpc.Channel, rpc: str, unique: str) -> None:
    """Claim the transaction, unless the rpc under test is itself a claim."""
    if rpc not in CLAIMS:
        send(channel, "ClaimTransaction", GOOD["ClaimTransaction"](unique).SerializeToString())


def stored(client: redis.Redis, unique: str) -> dict[bytes, Any]:
    """Return everything Redis stores about the transactions of a test."""
    return {key: client.get(key) for key in client.scan_iter(f"dedup:*{unique}*", count=1_000)}


def assert_readable(answer: RefusedCall) -> None:
    """Assert that the error text is printable and reveals no internals."""
    words = [answer.message, *answer.violations, *answer.violations.values()]
    assert all(text.isprintable() for text in words), words
    assert not [inside for inside in INTERNALS for text in words if inside in text], words


@pytest.mark.parametrize(("rpc", "case"), BROKEN)
def test_a_broken_message_is_rejected_and_changes_nothing(
    channel: grpc.Channel, redis_client: redis.Redis, unique: str, rpc: str, case: str
) -> None:
    """Undecodable bytes receive INVALID_ARGUMENT with `applied=no`, even after a valid message."""
    claim_first(channel, rpc, unique)
    before = stored(redis_client, unique)
    raw = malformed.broken(GOOD[rpc](unique))[case]
    answer = refused(lambda: send(channel, rpc, raw))
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (answer.reason, answer.domain, answer.applied) == ("INVALID_REQUEST", "dedup.v1", "no")
    assert answer.violations
    assert_readable(answer)
    assert stored(redis_client, unique) == before
    # The valid request still succeeds.
    assert send(channel, rpc, GOOD[rpc](unique).SerializeToString())


@pytest.mark.parametrize(("rpc", "case"), ODD)
def test_an_odd_but_valid_message_is_served(channel: grpc.Channel, unique: str, rpc: str, case: str) -> None:
    """Unknown fields and repeated fields that protobuf merges do not change the reply."""
    claim_first(channel, rpc, unique)
    raw = malformed.odd(GOOD[rpc](unique))[case]
    reply = getattr(dedup_pb2, f"{rpc}Response").FromString(send(channel, rpc, raw))
    if rpc == "BatchClaimTransactions":
        assert [entry.response.outcome for entry in reply.entries] == [dedup_pb2.CLAIM_OUTCOME_CLAIMED] * 2
    elif rpc == "GetTransaction":
        assert reply.transaction.transaction_id == unique
    else:
        # CLAIMED, COMPLETED, RELEASED and EXTENDED are all 1.
        assert reply.outcome == 1


def rejection_of(channel: grpc.Channel, rpc: str, raw: bytes) -> RefusedCall | None:
    """Return the error of an rpc, or None if it succeeds."""

    def raise_again(error: grpc.RpcError) -> None:
        raise error

    try:
        send(channel, rpc, raw)
    except grpc.RpcError as error:
        return refused(partial(raise_again, error))
    return None


@pytest.mark.parametrize("rpc", GOOD)
def test_randomly_damaged_messages_are_answered_or_rejected(
    own_service: ServiceProcess, channel: grpc.Channel, redis_client: redis.Redis, unique: str, rpc: str
) -> None:
    """Each damaged message is answered or rejected with `applied=no`, and later calls succeed."""
    for number, raw in enumerate(malformed.damaged(GOOD[rpc](unique), DAMAGED, SEED)):
        if answer := rejection_of(channel, rpc, raw):
            assert answer.code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}, (number, raw)
            assert answer.applied == "no"
            assert_readable(answer)
    assert all(redis_client.pttl(key) > 0 for key in stored(redis_client, unique))
    with own_service.channel() as other:
        reply = dedup_pb2_grpc.DedupServiceStub(other).ClaimTransaction(Claim(transaction_id=uuid.uuid4().hex))
    assert reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED


FALSE_PREFIXES: dict[str, tuple[Callable[[bytes], bytes], tuple[tuple[str, str], ...]]] = {
    "a length too long": (lambda m: grpc_message(m, length=len(m) + 1), ()),
    "a length too short": (lambda m: grpc_message(m, length=len(m) - 1), ()),
    "a length of 4 GiB": (lambda m: grpc_message(m, length=2**32 - 1), ()),
    "a length of 0": (lambda m: grpc_message(m, length=0), ()),
    "half a prefix": (lambda m: grpc_message(m)[:4], ()),
    "no message": (lambda _: b"", ()),
    "compressed, and is not": (lambda m: grpc_message(m, flag=1), (("grpc-encoding", "gzip"),)),
    "compressed, and cut short": (
        lambda m: grpc_message(gzip.compress(m)[:-9], flag=1),
        (("grpc-encoding", "gzip"),),
    ),
    "compressed in an unknown way": (lambda m: grpc_message(m, flag=1), (("grpc-encoding", "zstd"),)),
    "compressed from 8 MiB": (
        lambda m: grpc_message(gzip.compress(m + malformed.nested(15, bytes(8 << 20))), flag=1),
        (("grpc-encoding", "gzip"),),
    ),
    "flag 2": (lambda m: grpc_message(m, flag=2), ()),
    "flag 255": (lambda m: grpc_message(m, flag=255), ()),
}
"""Five-byte message prefixes that do not match the message, with the headers to send."""


def call_frames(peer: HostilePeer, rpc: str, body: bytes, *headers: tuple[str, str]) -> bytes:
    """Return the HTTP/2 frames of a call with a raw body."""
    return peer.headers(1, *headers, path=path_of(rpc)) + data(1, body, end_stream=True)


@pytest.mark.parametrize("case", FALSE_PREFIXES)
def test_a_false_message_prefix_changes_nothing(
    own_service: ServiceProcess, channel: grpc.Channel, redis_client: redis.Redis, unique: str, case: str
) -> None:
    """No rpc answers OK if the body is not the one message that its prefix announces, and nothing changes."""
    make, headers = FALSE_PREFIXES[case]
    for rpc, good in GOOD.items():
        name = f"{unique}-{rpc}"
        message = good(name).SerializeToString()
        claim_first(channel, rpc, name)
        before = stored(redis_client, name)
        with HostilePeer(own_service.target).shake_hands() as peer:
            peer.send(call_frames(peer, rpc, make(message), *headers))
            said = peer.answers(0.1)
        assert {one for one in said if one.startswith("status")} <= REFUSALS, (rpc, said)
        assert not [inside for inside in INTERNALS for text in peer.messages if inside in text], peer.messages
        assert stored(redis_client, name) == before, rpc
        assert send(channel, rpc, message)


TRAILING_BYTES: dict[str, Callable[[bytes], bytes]] = {
    "another message": lambda m: grpc_message(m) + grpc_message(m.replace(b"first-", b"other-")),
    "half a message": lambda m: grpc_message(m) + grpc_message(m)[:-1],
    "half a prefix": lambda m: grpc_message(m) + bytes(2),
    "the flag of compression alone": lambda m: grpc_message(m, flag=1),
}


@pytest.mark.parametrize("case", TRAILING_BYTES)
def test_bytes_after_a_message_are_never_claimed(
    own_service: ServiceProcess, redis_client: redis.Redis, unique: str, case: str
) -> None:
    """A claim followed by more bytes is answered OK and claimed, or neither; the extra bytes are never claimed.

    The engines differ: grpcio reads one message of a unary call and ignores the rest.
    """
    message = GOOD["ClaimTransaction"](f"first-{unique}").SerializeToString()
    said: Counter[str] = Counter()
    with HostilePeer(own_service.target).shake_hands() as peer:
        peer.send(call_frames(peer, "ClaimTransaction", TRAILING_BYTES[case](message)))
        wait_until(lambda: said.update(peer.answers(0.1)) or said, what="an answer")
    held = stored(redis_client, unique)
    assert ("status 0" in said) == bool(held)
    assert not [key for key in held if b"other-" in key]
