"""grpcurl without a proto file, through server reflection."""

import json
import os
import shutil
import subprocess

import pytest

from tests.support.processes import ServiceProcess

GRPCURL = shutil.which("grpcurl")

# CI builds grpcurl and sets REQUIRE_GRPCURL, so a missing grpcurl fails there. Elsewhere it is optional.
pytestmark = [
    pytest.mark.every_engine,
    pytest.mark.skipif(GRPCURL is None and "REQUIRE_GRPCURL" not in os.environ, reason="grpcurl is not on PATH"),
]


def grpcurl(*arguments: str) -> str:
    """Run grpcurl in plaintext and return its output."""
    assert GRPCURL is not None, "grpcurl is not on PATH"
    ended = subprocess.run([GRPCURL, "-plaintext", *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_list_and_describe(service: ServiceProcess) -> None:
    """Reflection lets grpcurl list the service and describe the claim rpc."""
    assert "dedup.v1.DedupService" in grpcurl(service.target, "list").splitlines()
    described = grpcurl(service.target, "describe", "dedup.v1.DedupService")
    assert "rpc ClaimTransaction ( .dedup.v1.ClaimTransactionRequest )" in described
    assert "expire_time" in grpcurl(service.target, "describe", "dedup.v1.ClaimTransactionRequest")


def test_claim_twice(service: ServiceProcess, unique: str) -> None:
    """The first call receives CLAIMED, the second DUPLICATE with the holder."""
    arguments = (
        "-d",
        json.dumps({"transaction_id": unique, "claimant": "by hand", "ttl": "30s"}),
        service.target,
        "dedup.v1.DedupService/ClaimTransaction",
    )
    first, second = json.loads(grpcurl(*arguments)), json.loads(grpcurl(*arguments))
    assert first["outcome"] == "CLAIM_OUTCOME_CLAIMED"
    assert second["outcome"] == "CLAIM_OUTCOME_DUPLICATE"
    assert second["transaction"]["claimant"] == "by hand"
