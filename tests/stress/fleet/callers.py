"""The callers: each sends one key until it receives a success, as a client that follows the contract does."""

import asyncio
import random
from dataclasses import dataclass

import httpx

_TIMEOUT_S = 300.0
# A query that frameworks decode differently: it is part of the fingerprint as sent.
_TARGET = "/rewards?from=a%20b&c+d"


@dataclass(frozen=True, slots=True)
class Order:
    """The request that callers send with one key."""

    key: str
    work_ms: int
    fails: bool = False
    """The service answers 500 after the work."""

    @property
    def body(self) -> dict[str, object]:
        """The request. The trigger of the table reads the duration of the work from the amount."""
        return {"unit": "coins", "amount": self.work_ms} | ({"simulate": "error"} if self.fails else {})


class Caller:
    """Sends orders to the route."""

    def __init__(self, url: str, rng: random.Random) -> None:
        self._rng = rng
        self._client = httpx.AsyncClient(
            base_url=url,
            timeout=_TIMEOUT_S,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def send(self, order: Order, patience: int) -> None:
        """Send until a success, or until `patience` answers say that the effect is unknown: 409 and 500."""
        failures = 0
        while patience:
            answer = await self.post(order)
            if answer is not None and answer.is_success:
                return
            patience -= answer is not None and answer.status_code in (409, 500)
            if answer is not None and answer.status_code == 409:
                await asyncio.sleep(int(answer.headers.get("retry-after", 1)))
            elif answer is None or answer.status_code >= 500:
                await asyncio.sleep(self._rng.uniform(0.05, min(2.0, 0.2 * 2**failures)))
                failures += 1
            else:
                # The checker reports it.
                return

    async def post(self, order: Order) -> httpx.Response | None:
        """Send once, and return the answer; None if the connection closed before it."""
        try:
            return await self._client.post(_TARGET, json=order.body, headers={"Idempotency-Key": order.key})
        except httpx.TransportError:
            return None
