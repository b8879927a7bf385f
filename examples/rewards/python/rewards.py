"""The work of the reward service, without HTTP: checks an order, pays it, and describes the response."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dedup.idempotency import current_claim
from ledger import NAME, Ledger

DEFAULT_SECONDS = 3.0
LARGE_BYTES = 10_000


@dataclass(frozen=True)
class Response:
    """What the service answers."""

    status: int
    headers: dict[str, str]
    body: str


def pay(ledger: Ledger, key: str, order: Any) -> Response:
    """Pay the reward of an order, and return the response. `simulate` is described in the README."""
    if not isinstance(order, Mapping):
        return problem(400, "the body is not a JSON object")
    unit, amount, simulate = str(order.get("unit", "")), order.get("amount"), order.get("simulate")
    if not isinstance(amount, int) or amount <= 0:
        # Nothing was paid: the guard releases the key after a 4xx, and the caller may correct the order under it.
        return problem(400, "amount is not a whole number above 0")
    if simulate == "slow":
        time.sleep(float(order.get("seconds", DEFAULT_SECONDS)))
    claim = current_claim()
    if claim is not None and claim.lost:
        # Another process may pay by now. A 503 keeps the key: this attempt has paid nothing, but that one may.
        return problem(503, "the claim was lost before the reward was paid")
    number = ledger.pay(key.strip('"'), unit, amount)
    if simulate == "error":
        # Paid, but not answered: the guard keeps the key after a 5xx.
        return problem(500, "the reward was paid, and then the service failed")
    body: dict[str, Any] = {"id": number, "unit": unit, "amount": amount}
    if simulate == "large":
        body["padding"] = "x" * LARGE_BYTES
    headers = {
        "Content-Type": "application/json",
        "Location": f"/rewards/{number}",
        "ETag": f'"reward-{number}"',
        # Belongs to one caller: the guard never stores it.
        "Set-Cookie": f"served_by={NAME}; Path=/",
    }
    return Response(201, headers, json.dumps(body))


def paid(ledger: Ledger) -> Response:
    """Return the response that lists all rewards."""
    return Response(200, {"Content-Type": "application/json"}, json.dumps([asdict(reward) for reward in ledger.paid()]))


def problem(status: int, title: str) -> Response:
    """Return a problem document (RFC 9457)."""
    body = {"type": "about:blank", "title": title, "status": status}
    return Response(status, {"Content-Type": "application/problem+json"}, json.dumps(body))
