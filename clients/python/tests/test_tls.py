"""Credentials enable TLS and identify the caller, for both clients."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from dedup import CallFailed, Client, Unavailable, aio, call_metadata
from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.certificates import Authority
from tests.support.processes import ServiceProcess

TOKEN = "a-token-of-twenty-21"


class Service(dedup_pb2_grpc.DedupServiceServicer):
    """Answers every GetTransaction."""

    def GetTransaction(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - The name of the rpc.
        """Return the requested id."""
        found = dedup_pb2.Transaction(transaction_id=request.transaction_id)
        return dedup_pb2.GetTransactionResponse(transaction=found)


@pytest.fixture
def authority() -> trustme.CA:
    """The issuer of the server's certificate."""
    return trustme.CA()


@pytest.fixture
def target(authority: trustme.CA) -> Iterator[str]:
    """Address of a server with TLS."""
    certificate = authority.issue_cert("localhost")
    server = grpc.server(ThreadPoolExecutor(2))
    dedup_pb2_grpc.add_DedupServiceServicer_to_server(Service(), server)  # type: ignore[abstract]  # No other rpc is called.
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    yield f"localhost:{port}"
    server.stop(None).wait()


async def test_a_trusted_certificate_is_enough(target: str, authority: trustme.CA) -> None:
    """A plaintext channel or an unknown issuer gets no answer."""
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with Client(target, credentials=credentials, timeout=20) as blocking:
        found = blocking.get("x")
        assert found is not None
        assert found.transaction_id == "x"
    async with aio.Client(target, credentials=credentials, timeout=20) as waiting:
        assert await waiting.get("x") == found
    with Client(target, timeout=0.5) as plain, pytest.raises(Unavailable):
        plain.get("x")
    stranger = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
    with Client(target, credentials=stranger, timeout=0.5) as wary, pytest.raises(Unavailable):
        wary.get("x")


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[str, Authority]]:
    """Address of the real service with TLS and tokens, and the issuer of its certificate."""
    authority = Authority(tmp_path)
    cert, key = authority.server_files()
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'me = "{TOKEN}"')
    service = ServiceProcess(
        *("--tls-cert", str(cert), "--tls-key", str(key), "--auth-tokens", str(tokens)),
        *("--store-url", f"sqlite://{tmp_path / 'claims.db'}"),
    )
    yield service.start().target, authority
    service.kill()


async def test_a_token_identifies_the_caller(secured: tuple[str, Authority]) -> None:
    """The channel or `call_metadata` sends it. Without a token the call fails at once and is not retried."""
    target, authority = secured
    tls = authority.credentials()
    credentials = grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(TOKEN))
    with Client(target, credentials=credentials, timeout=20) as blocking, blocking.claim("order-1") as claim:
        assert claim.claim_token
    async with aio.Client(target, credentials=credentials, timeout=20) as waiting, waiting.claim("order-2") as claimed:
        assert claimed.claim_token
    with Client(target, credentials=tls, timeout=20) as client:
        with pytest.raises(CallFailed) as refused:
            client.get("order-1")
        assert (refused.value.reason, refused.value.applied) == ("CALLER_UNKNOWN", "no")
        with call_metadata(("authorization", f"Bearer {TOKEN}")):
            assert client.get("order-1") is not None
