"""Attacks and protocol violations over HTTP/2 and gRPC: other callers are still served."""

import random
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from hyperframe.frame import ContinuationFrame, HeadersFrame

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.config.settings import EngineName
from dedup_service.server.engines import MAX_MESSAGE_BYTES
from tests.support.attacks import ATTACKS, BOMB_MIB, a_claim, compressed_bomb
from tests.support.errors import refused
from tests.support.hostile_peer import CLAIM_PATH, PREFACE, HostilePeer, data, grpc_message
from tests.support.malformed import heavy
from tests.support.polling import wait_until
from tests.support.processes import ServiceProcess

pytestmark = pytest.mark.every_engine

HEALTH_PATH = "/grpc.health.v1.Health/Check"
REFLECTION_PATH = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
LIMITS = {
    "ClaimTransaction": 65_536,
    "CompleteTransaction": 65_536 + 4_096,
    "BatchClaimTransactions": 65_536 + 1_048_576,
}

# The size of each attack and its memory limit in MiB, far above the measured cost. Without a limit on streams grpcio
# needs 300 MiB for these resets. docs/engines.md has the cost of each engine at larger sizes.
ATTACK_SIZES = {
    "rapid_reset": (40_000, 150),
    "made_you_reset": (20_000, 150),
    "pings": (10_000, 150),
    "settings": (50_000, 150),
    "empty_data": (50_000, 150),
    "continuations": (2_000, 150),
    "header_bomb": (50, 150),
    "a_message_too_long": (2_000, 150),
    "streams_that_never_end": (10_000, 500),
    "too_many_streams": (10_000, 150),
    "slow_readers": (2_000, 150),
    "half_open": (300, 150),
    "hang_ups": (300, 150),
}


@pytest.fixture(scope="module")
def attacked(engine: EngineName, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service for this module; it must survive every test and exit with 0."""
    url = f"sqlite://{tmp_path_factory.mktemp('attacked') / 'claims.db'}"
    process = ServiceProcess("--engine", engine, "--store-url", url, "--max-in-flight", "1000").start()
    yield process
    assert process.stop() == 0


def claim_succeeds(service: ServiceProcess) -> bool:
    """Return whether a claim over a new connection receives CLAIMED; False at the in-flight limit."""
    with service.channel() as channel:
        request = dedup_pb2.ClaimTransactionRequest(transaction_id=uuid.uuid4().hex)
        try:
            reply = dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(request, timeout=20)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return False
    return reply.outcome == dedup_pb2.CLAIM_OUTCOME_CLAIMED


def memory_mib(service: ServiceProcess, kind: str = "VmRSS") -> int:
    """Return the resident memory of a service in MiB, or its peak, VmHWM; 0 if the platform does not report it."""
    if sys.platform != "linux":
        return 0
    return int(Path(f"/proc/{service.pid}/status").read_text().split(f"{kind}:")[1].split()[0]) // 1024


@pytest.mark.parametrize("name", ATTACKS)
def test_other_callers_are_served_during_and_after_an_attack(attacked: ServiceProcess, name: str) -> None:
    """Other callers' claims succeed during and after each attack, and the attack's memory cost is bounded.

    Protections: the limit on streams per connection for attacks that open streams, otherwise the engine.
    """
    before = memory_mib(attacked)
    size, limit_mib = ATTACK_SIZES[name]
    with ATTACKS[name](attacked.target, size):
        wait_until(lambda: claim_succeeds(attacked), what="a claim during the attack")
        assert memory_mib(attacked) - before < limit_mib
    assert claim_succeeds(attacked)


def test_calls_over_the_stream_limit_are_rejected(attacked: ServiceProcess) -> None:
    """Of 10,000 calls on one connection, those over the limit are rejected or close the connection.

    Protection: the limit on streams per connection, which the server also announces.
    """
    with ATTACKS["too_many_streams"](attacked.target, 10_000) as said:
        assert any(answer.startswith(("reset", "goaway")) for answer in said), said


def test_messages_and_metadata_over_the_limits_are_rejected(attacked: ServiceProcess, unique: str) -> None:
    """A message of 8 MiB, or 20 KiB of metadata, fails the call and claims nothing."""
    message = a_claim(unique)
    padding = bytes.fromhex("fa7f") + b"\x80\x80\x80\x04" + bytes(8 * 1024 * 1024)
    metadata = tuple((f"x-{number}", "v" * 1_000) for number in range(20))
    with grpc.insecure_channel(attacked.target, options=[("grpc.max_send_message_length", -1)]) as channel:
        claim: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(CLAIM_PATH)
        assert refused(lambda: claim(message + padding)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        # The native engine answers with an HTTP status, which the client reports as UNKNOWN.
        codes = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN)
        assert refused(lambda: claim(message, metadata=metadata)).code in codes
    assert not held(attacked, unique)
    assert claim_succeeds(attacked)


@pytest.mark.parametrize("case", heavy(MAX_MESSAGE_BYTES - 4_096))
def test_a_heavy_request_is_answered(attacked: ServiceProcess, case: str) -> None:
    """A request that is as much work as 2 MiB can be is answered, in few words, and the next caller is served.

    Protections: the limits on the bytes of a request and the claims of a batch, which their errors name.
    tests/unit/test_heavy_requests.py counts the work.
    """
    rpc, raw = heavy(MAX_MESSAGE_BYTES - 4_096)[case]
    with attacked.channel() as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/dedup.v1.DedupService/{rpc}")
        if len(raw) > 1024 * 1024:
            assert f"at most {LIMITS[rpc]} bytes are allowed for {rpc}" in refused(lambda: call(raw)).message
        else:
            with suppress(grpc.RpcError):
                call(raw)
    assert claim_succeeds(attacked)


@pytest.fixture
def fresh(engine: EngineName, tmp_path: Path) -> Iterator[ServiceProcess]:
    """A service for one test, whose peak of memory is not that of other tests."""
    process = ServiceProcess(
        "--engine", engine, "--store-url", f"sqlite://{tmp_path / 'c.db'}", "--health-listen", "127.0.0.1:0"
    ).start()
    yield process
    assert process.stop() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak memory of another process")
def test_compressed_messages_are_refused_before_they_are_unpacked(fresh: ServiceProcess) -> None:
    """A message of 63 kB that unpacks to 62 MiB is refused, on every service, without memory for it.

    Protection: grpcio knows no compression. `native` unpacks gzip on its own services, which docs/engines.md says: the
    day this test fails for it, the limitation is gone.
    """
    health = fresh.events("health_listener_started")[0]["addresses"][0]
    unpacks = fresh.events("server_started")[0]["engine"] == "native"
    before = memory_mib(fresh, "VmHWM")
    assert compressed_bomb(fresh.target, "deflate")["status 12"] == 1
    assert compressed_bomb(fresh.target, "gzip", REFLECTION_PATH)["status 12"] == 1
    assert compressed_bomb(health, "gzip", HEALTH_PATH)["status 12"] == 1
    assert memory_mib(fresh, "VmHWM") - before < BOMB_MIB // 2
    for path in (CLAIM_PATH, HEALTH_PATH):
        answers = compressed_bomb(fresh.target, "gzip", path)
        assert answers["status 8" if unpacks else "status 12"] == 1, answers
    assert (memory_mib(fresh, "VmHWM") - before < BOMB_MIB // 2) is not unpacks
    assert claim_succeeds(fresh)


def raw_headers(stream: int, block: bytes, *flags: str) -> bytes:
    """Return a HEADERS frame with a block that may be invalid."""
    return HeadersFrame(stream or 1, block, flags=flags).serialize()[:5] + stream.to_bytes(4) + block


def invalid_claim(peer: HostilePeer, message: bytes, case: str) -> bytes:
    """Return the bytes of an invalid claim, without the connection preface."""
    body = data(1, grpc_message(message), end_stream=True)
    cases: dict[str, Callable[[], bytes]] = {
        "data before headers": lambda: body,
        "headers on stream 0": lambda: raw_headers(0, peer.block(), "END_HEADERS") + body,
        "a stream of the server's": lambda: raw_headers(2, peer.block(), "END_HEADERS") + data(2, message),
        "continuation of nothing": lambda: ContinuationFrame(1, peer.block()).serialize() + body,
        "data within headers": lambda: raw_headers(1, peer.block()) + body,
        "no such header": lambda: raw_headers(1, b"\xff\xff\xff\x0f", "END_HEADERS") + body,
        "headers cut short": lambda: raw_headers(1, peer.block()[:-3], "END_HEADERS") + body,
        "no path": lambda: raw_headers(1, b"\x83\x86", "END_HEADERS") + body,
        "a frame too long": lambda: peer.headers(1) + data(1, grpc_message(message + bytes(20_000)), end_stream=True),
        "the end too early": lambda: peer.headers(1) + data(1, grpc_message(message, length=99), end_stream=True),
        "half a prefix": lambda: peer.headers(1) + data(1, grpc_message(message)[:3], end_stream=True),
        "no message": lambda: peer.headers(1) + data(1, b"", end_stream=True),
        "no end": lambda: peer.headers(1) + data(1, grpc_message(message)[:-1]),
    }
    return cases[case]()


BROKEN = (
    *("data before headers", "headers on stream 0", "a stream of the server's"),
    *("continuation of nothing", "data within headers", "no such header", "headers cut short", "no path"),
    *("a frame too long", "the end too early", "half a prefix"),
    *("no message", "no end"),
)


def held(service: ServiceProcess, transaction_id: str) -> bool:
    """Return whether a transaction is claimed."""
    with service.channel() as channel:
        request = dedup_pb2.GetTransactionRequest(transaction_id=transaction_id)
        stub = dedup_pb2_grpc.DedupServiceStub(channel)
        return refused(lambda: stub.GetTransaction(request)).code.name != "NOT_FOUND"


@pytest.mark.parametrize("case", BROKEN)
def test_an_invalid_claim_claims_nothing(attacked: ServiceProcess, unique: str, case: str) -> None:
    """An invalid or incomplete claim is never answered OK and claims nothing; the next caller is served."""
    with HostilePeer(attacked.target).shake_hands() as peer:
        peer.send(invalid_claim(peer, a_claim(unique), case))
        assert "status 0" not in peer.answers(0.1)
    assert not held(attacked, unique)
    assert claim_succeeds(attacked)


def test_a_second_path_does_not_evade_authorization(engine: EngineName, tmp_path: Path, unique: str) -> None:
    """A caller that may only look up cannot claim by a call with both paths, whichever comes first.

    Protection: the endpoint that serves the call authorizes its own method. `grpcio` serves the last path.
    """
    (tmp_path / "tokens.toml").write_text('support = "a-token-of-twenty-21"')
    (tmp_path / "policy.toml").write_text('[callers.support]\nrpcs = ["GetTransaction"]')
    files = ("--auth-tokens", str(tmp_path / "tokens.toml"), "--policy-file", str(tmp_path / "policy.toml"))
    service = ServiceProcess("--engine", engine, "--store-url", f"sqlite://{tmp_path / 'c.db'}", *files).start()
    token = ("authorization", "Bearer a-token-of-twenty-21")
    paths = (CLAIM_PATH, CLAIM_PATH.replace("ClaimTransaction", "GetTransaction"))
    try:
        for first, last in (paths, paths[::-1]):
            with HostilePeer(service.target).shake_hands() as peer:
                peer.send(peer.headers(1, (":path", last), token, path=first))
                peer.send(data(1, grpc_message(a_claim(unique)), end_stream=True))
                assert "status 0" not in peer.answer()
        with grpc.insecure_channel(service.target) as channel:
            stub = dedup_pb2_grpc.DedupServiceStub(channel)
            request = dedup_pb2.GetTransactionRequest(transaction_id=unique)
            missing = refused(lambda: stub.GetTransaction(request, metadata=(token,)))
        assert missing.code is grpc.StatusCode.NOT_FOUND
    finally:
        assert service.stop() == 0


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"?"])
def test_other_protocols_do_not_disturb_the_service(attacked: ServiceProcess, greeting: bytes) -> None:
    """Other callers are served during and after a connection that sends HTTP/1.1, TLS or noise."""
    with HostilePeer(attacked.target) as peer:
        peer.send(greeting)
        assert "status 0" not in peer.answers(0.1)
        assert claim_succeeds(attacked)
    assert claim_succeeds(attacked)


def test_the_service_survives_damaged_calls(attacked: ServiceProcess) -> None:
    """The service still serves after 200 calls with one to five randomly changed bytes."""
    chance = random.Random(20261123)
    for number in range(200):
        with HostilePeer(attacked.target) as peer:
            call = bytearray(PREFACE + bytes.fromhex("000000040000000000") + peer.call(1, a_claim(f"fuzz-{number}")))
            for _ in range(chance.randint(1, 5)):
                call[chance.randrange(len(call))] = chance.randrange(256)
            peer.send(bytes(call))
            with suppress(OSError):
                peer.socket.shutdown(socket.SHUT_WR)
            peer.answers(0.02)
    assert claim_succeeds(attacked)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux changes the limits of another process")
def test_the_service_survives_file_descriptor_exhaustion(attacked: ServiceProcess) -> None:
    """A service whose peers used up all file descriptors serves again after they disconnect."""
    import resource

    before = resource.prlimit(attacked.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(attacked.pid, resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        peers = [HostilePeer(attacked.target) for _ in range(80)]
        wait_until(lambda: sum(1 for _ in Path(f"/proc/{attacked.pid}/fd").iterdir()) == 64, what="the last descriptor")
        for peer in peers:
            peer.socket.close()
        assert claim_succeeds(attacked)
    finally:
        resource.prlimit(attacked.pid, resource.RLIMIT_NOFILE, before)
