"""TLS: which callers are served, certificate rotation, and configuration errors."""

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.certificates import Authority, replace
from tests.support.errors import refused
from tests.support.polling import eventually, wait_until
from tests.support.processes import ServiceProcess, run_command

Claim = dedup_pb2.ClaimTransactionRequest
Start = Callable[..., ServiceProcess]
CLAIMED = dedup_pb2.CLAIM_OUTCOME_CLAIMED


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """The certificate authority that server and callers trust."""
    return Authority(tmp_path)


@pytest.fixture
def start_tls(start_grpcio: Start, authority: Authority, tmp_path: Path) -> Start:
    """Starts the service with a certificate of the authority."""

    def start(*arguments: str) -> ServiceProcess:
        cert, key = authority.server_files()
        files = ("--tls-cert", str(cert), "--tls-key", str(key))
        return start_grpcio(*files, "--store-url", f"sqlite://{tmp_path / 'claims.db'}", *arguments)

    return start


def claim(target: str, credentials: grpc.ChannelCredentials | None, transaction_id: str) -> int:
    """Claim over a new connection and return the outcome."""
    channel = grpc.insecure_channel(target) if credentials is None else grpc.secure_channel(target, credentials)
    with channel:
        request = Claim(transaction_id=transaction_id)
        return int(dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(request, timeout=10).outcome)


def served_certificate(target: str) -> str:
    """Return the certificate that the server presents on a new connection."""
    host, _, port = target.rpartition(":")
    return ssl.get_server_certificate((host, int(port)))


def test_plaintext_callers_are_not_served(start_tls: Start, authority: Authority, unique: str) -> None:
    """A caller that trusts the server's authority is served; a plaintext caller or one with another authority is not.

    Protection: the secure port.
    """
    service = start_tls()
    assert claim(service.target, authority.credentials(), unique) == CLAIMED
    assert refused(lambda: claim(service.target, None, unique)).code is grpc.StatusCode.UNAVAILABLE
    stranger = grpc.ssl_channel_credentials()
    assert refused(lambda: claim(service.target, stranger, unique)).code is grpc.StatusCode.UNAVAILABLE


def test_a_client_authority_requires_a_client_certificate(
    start_tls: Start, authority: Authority, tmp_path: Path, unique: str
) -> None:
    """With a client authority, callers without a certificate, or with one of another authority, are rejected.

    Protection: require_client_authentication.
    """
    service = start_tls("--tls-client-ca", str(authority.file))
    known = authority.caller_files("api", "api.example")
    assert claim(service.target, authority.credentials(known), unique) == CLAIMED
    impostor = Authority(tmp_path, "other").caller_files("impostor", "api.example")
    for credentials in (authority.credentials(), authority.credentials(impostor)):
        assert refused(lambda chosen=credentials: claim(service.target, chosen, unique)).code.name == "UNAVAILABLE"  # type: ignore[misc]


async def test_certificate_rotation_under_load_drops_no_call(
    start_tls: Start, authority: Authority, unique: str
) -> None:
    """While the certificate is replaced every call succeeds, on every address, over old and new connections.

    Later connections are presented the new certificate.

    Protection: each address checks the files before every handshake.
    """
    service = await asyncio.to_thread(start_tls, "--listen", "127.0.0.1:0,127.0.0.1:0")
    before = {target: await asyncio.to_thread(served_certificate, target) for target in service.addresses}
    answered: list[int] = []
    over = asyncio.Event()

    async def caller(number: int) -> None:
        target = service.addresses[number % 2]
        while not over.is_set():
            # One caller keeps its first connection; the others open a new one for each call.
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.secure_channel(target, authority.credentials(), options) as channel:
                stub = dedup_pb2_grpc.DedupServiceStub(channel)
                while not over.is_set():
                    request = Claim(transaction_id=f"{unique}-{len(answered)}-{number}")
                    answered.append((await stub.ClaimTransaction(request, timeout=20)).outcome)
                    if number:
                        break

    callers = [asyncio.create_task(caller(number)) for number in range(4)]

    async def more(than: int) -> bool:
        return len(answered) > than

    await eventually(lambda: more(50), what="traffic")
    authority.server_files()
    for target in service.addresses:
        await eventually(lambda target=target: _differs(target, before[target]), what="the new certificate")  # type: ignore[misc]
    seen = len(answered)
    await eventually(lambda: more(seen + 50), what="traffic after the rotation")
    over.set()
    await asyncio.gather(*callers)
    assert set(answered) == {CLAIMED}
    await asyncio.to_thread(wait_until, lambda: service.events("tls_reloaded"), what="the tls_reloaded event")


async def _differs(target: str, before: str) -> bool:
    return await asyncio.to_thread(served_certificate, target) != before


def test_a_new_client_authority_applies_to_later_connections(
    start_tls: Start, authority: Authority, tmp_path: Path, unique: str
) -> None:
    """After the client authority is replaced, its callers are served and those of the previous one are rejected."""
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(authority.pem)
    service = start_tls("--tls-client-ca", str(trusted))
    old = authority.credentials(authority.caller_files("old", "old.example"))
    other = Authority(tmp_path, "other")
    cert, key = (path.read_bytes() for path in other.caller_files("new", "new.example"))
    new = grpc.ssl_channel_credentials(authority.pem, key, cert)
    assert claim(service.target, old, f"{unique}-1") == CLAIMED
    replace(trusted, other.pem)
    assert claim(service.target, new, f"{unique}-2") == CLAIMED
    assert refused(lambda: claim(service.target, old, f"{unique}-3")).code is grpc.StatusCode.UNAVAILABLE


def test_an_invalid_key_pair_keeps_the_previous_certificate(
    start_tls: Start, authority: Authority, unique: str
) -> None:
    """If key and certificate do not match, the previous pair stays in use and one error is logged.

    The corrected pair applies to the next connection.

    Protection: a new pair is checked before it is passed to gRPC.
    """
    service = start_tls()
    before = served_certificate(service.target)
    cert, key = authority.server_files("next")
    replace(cert.with_name("server.crt"), cert.read_bytes())
    for number in range(3):
        assert claim(service.target, authority.credentials(), f"{unique}-{number}") == CLAIMED
    assert served_certificate(service.target) == before
    wait_until(lambda: service.events("tls_reload_failed"), what="the log line")
    assert len(service.events("tls_reload_failed")) == 1
    assert "are not a certificate and its unencrypted key" in service.events("tls_reload_failed")[0]["message"]
    replace(key.with_name("server.key"), key.read_bytes())
    assert served_certificate(service.target) == cert.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--tls-cert", "{cert}"), 2, "DEDUP_TLS_CERT is set and DEDUP_TLS_KEY is not"),
        (("--tls-key", "{key}"), 2, "DEDUP_TLS_KEY is set and DEDUP_TLS_CERT is not"),
        (("--tls-client-ca", "{ca}"), 2, "client certificates need TLS"),
        (("--tls-cert", "{cert}", "--tls-key", "/nowhere"), 1, "/nowhere does not exist or cannot be read"),
        (("--tls-cert", "{key}", "--tls-key", "{key}"), 1, "are not a certificate and its unencrypted key"),
        (
            ("--tls-cert", "{cert}", "--tls-key", "{key}", "--tls-client-ca", "{key}"),
            1,
            "is not the certificate of an auth",
        ),
        (
            ("--tls-cert", "{cert}", "--tls-key", "{key}", "--engine", "native"),
            1,
            "the engine 'native' does not support TLS",
        ),
    ],
)
def test_an_incomplete_tls_configuration_prevents_start_up(
    authority: Authority, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """The server exits and names the missing setting instead of serving plaintext."""
    cert, key = authority.server_files()
    files = {"cert": cert, "key": key, "ca": authority.file}
    given = [argument.format(**files) for argument in arguments]
    ended = run_command("serve", "--listen", "127.0.0.1:0", "--store-url", f"sqlite://{tmp_path / 'c.db'}", *given)
    assert (ended.returncode, words in ended.stderr) == (code, True), ended.stderr
