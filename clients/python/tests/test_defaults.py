"""The defaults and log rules that the clients of all languages share (`clients/defaults.json`)."""

import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any

import grpc
import pytest

from dedup import ClaimLost, Client, DedupError, NotHeld, Unavailable, aio
from dedup.calls import extension
from dedup.handles import log_failed_ending
from dedup.ids import logged_id
from dedup.retries import RetryPolicy
from dedup.testing import AsyncFakeClient, FakeClient

CLIENTS = Path(__file__).parents[2]
DEFAULTS: dict[str, Any] = json.loads((CLIENTS / "defaults.json").read_text())


def test_retries_have_the_shared_defaults() -> None:
    """Budget, attempt timeout and backoff."""
    policy = RetryPolicy()
    assert policy.budget_s * 1000 == DEFAULTS["budget_ms"]
    assert policy.attempt_timeout_s * 1000 == DEFAULTS["attempt_timeout_ms"]
    assert policy.first_backoff_s * 1000 == DEFAULTS["first_backoff_ms"]
    assert policy.max_backoff_s * 1000 == DEFAULTS["longest_backoff_ms"]
    assert (DEFAULTS["backoff_multiplier"], DEFAULTS["jitter"]) == (2, "full")


@pytest.mark.parametrize("kind", [Client, aio.Client, FakeClient, AsyncFakeClient])
def test_every_client_has_the_shared_defaults(kind: type) -> None:
    """Clients repeat the numbers in their signatures, where editors show them."""
    parameters = inspect.signature(kind).parameters
    assert parameters["timeout"].default * 1000 == DEFAULTS["budget_ms"]
    assert parameters["on_unavailable"].default == DEFAULTS["on_unavailable"]
    if "attempt_timeout" in parameters:
        assert parameters["attempt_timeout"].default * 1000 == DEFAULTS["attempt_timeout_ms"]


def test_the_readme_states_the_shared_defaults() -> None:
    """The table in the section "Defaults" has one row for each number and word."""
    section = (CLIENTS / "python" / "README.md").read_text().split("\n## Defaults\n")[1].split("\n## ")[0]
    stated = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", section, re.MULTILINE))
    assert stated == {
        key: str(value) for key, value in DEFAULTS.items() if isinstance(value, int | str) and key != "about"
    }


@pytest.mark.parametrize("vector", DEFAULTS["logged_ids"], ids=lambda vector: vector["logged"])
def test_logged_ids_are_those_of_every_client(vector: dict[str, str]) -> None:
    """The first 16 hexadecimal digits of the SHA-256, without a key."""
    assert logged_id(vector["transaction_id"]) == vector["logged"]


def test_logs_never_contain_a_transaction_id(caplog: pytest.LogCaptureFixture) -> None:
    """Each log line names the transaction by its hash, also when the error itself names the id."""
    vector = DEFAULTS["logged_ids"][0]
    client = FakeClient(on_unavailable="allow")

    def fail(transaction_id: str, *, unavailable: bool) -> None:
        with client.claim(transaction_id, ttl=1, release_on=(ZeroDivisionError,)):
            client.service.unavailable = unavailable
            client.service.advance(5)
            raise ZeroDivisionError

    with caplog.at_level(logging.DEBUG):
        for unavailable in (False, True):
            with pytest.raises(ZeroDivisionError):
                fail(vector["transaction_id"], unavailable=unavailable)
        assert client.claim(vector["transaction_id"]).fail_open
    assert len(caplog.records) == 3
    for record in caplog.records:
        assert vector["logged"] in record.getMessage()
        assert vector["transaction_id"] not in record.getMessage()


def test_logs_of_middleware_never_contain_a_transaction_id(caplog: pytest.LogCaptureFixture) -> None:
    """The middleware and the interceptors log a failed ending through the same function."""
    claim = FakeClient().claim("order-1234")
    for error in (NotHeld("order-1234"), Unavailable("away", code=grpc.StatusCode.UNAVAILABLE)):
        log_failed_ending(claim, error)
    assert len(caplog.records) == 2
    assert all("71983129e5088fcb" in record.getMessage() for record in caplog.records)
    assert "order-1234" not in caplog.text


def test_reprs_contain_no_token() -> None:
    """A traceback that shows local variables must not show what authorises completing a claim."""
    client = FakeClient()
    claim = client.claim("order-1234", keep_alive=True)
    step = extension(claim._grant, 1.0, 1.0)
    for value in (claim, vars(claim), claim._grant, claim.transaction, step, client, vars(client)):
        assert claim.claim_token not in repr(value)
    assert repr(claim) == "<Claim of transaction 71983129e5088fcb>"


def test_exceptions_name_a_transaction_by_its_hash() -> None:
    """Frameworks log the text and the repr of an exception."""
    client = FakeClient()
    claim = client.claim("order-1234", fingerprint=b"one", ttl=1)
    client.service.advance(0)
    errors: list[DedupError] = [ClaimLost("order-1234")]
    for options in ({}, {"fingerprint": b"two"}):
        with pytest.raises(DedupError) as caught:
            client.claim("order-1234", **options)  # type: ignore[arg-type]
        errors.append(caught.value)
    client.service.advance(2)
    with pytest.raises(NotHeld) as not_held:
        claim.complete()
    for error in (*errors, not_held.value):
        assert "71983129e5088fcb" in str(error)
        for shown in (str(error), repr(error)):
            assert "order-1234" not in shown
            assert claim.claim_token not in shown
