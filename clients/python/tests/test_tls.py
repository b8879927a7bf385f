"""Credentials make the channel TLS, for both clients."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import trustme

from dedup import Client, Unavailable, aio
from dedup.v1 import dedup_pb2, dedup_pb2_grpc


class Service(dedup_pb2_grpc.DedupServiceServicer):
    """Answers every look-up."""

    def GetTransaction(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802 - As the contract names it.
        """Answer with the id that was asked for."""
        found = dedup_pb2.Transaction(transaction_id=request.transaction_id)
        return dedup_pb2.GetTransactionResponse(transaction=found)


@pytest.fixture
def authority() -> trustme.CA:
    """Who signs the server's certificate."""
    return trustme.CA()


@pytest.fixture
def target(authority: trustme.CA) -> Iterator[str]:
    """The address of a server that speaks TLS."""
    certificate = authority.issue_cert("localhost")
    server = grpc.server(ThreadPoolExecutor(2))
    dedup_pb2_grpc.add_DedupServiceServicer_to_server(Service(), server)  # type: ignore[abstract]  # Only looked up.
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    yield f"localhost:{port}"
    server.stop(None).wait()


async def test_a_certificate_that_is_trusted_is_enough(target: str, authority: trustme.CA) -> None:
    """And without credentials the channel is plaintext, which such a server does not answer."""
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
