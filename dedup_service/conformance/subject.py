"""The service under test: how its requests are made, and how its responses are judged."""

import asyncio
import json
import secrets
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from dedup_service.conformance.contract import KEY_HEADER, MAX_BODY_BYTES, UNAVAILABLE, Refusal, is_replay, refusal_of
from dedup_service.conformance.exchange import Fleet, Response

RETRY_S = 0.2
# The answers to a method or path that a service does not have.
NOT_REACHABLE = frozenset({404, 405, 501})


class Failed(Exception):
    """The service breaks the contract; the message says how."""


class Skipped(Exception):
    """The check does not apply, or needs an option; the message says which."""


class CouldNotRun(Exception):
    """The check has no result; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The addresses and bodies of the requests. An absent body skips the checks that need it.

    `route` is a path with an optional query. `claimant` is the name that the service's client claims under.
    """

    base_urls: Sequence[str]
    route: str
    body: bytes
    other_body: bytes | None = None
    rejected_body: bytes | None = None
    failing_body: bytes | None = None
    slow_body: bytes | None = None
    large_body: bytes | None = None
    other_route: str | None = None
    headers: Sequence[tuple[str, str]] = ()
    claimant: str = ""
    max_body_bytes: int = MAX_BODY_BYTES
    timeout_s: float = 30.0


class Subject:
    """Sends the requests of the checks. Remembers replays and refusals, which later checks look at again."""

    def __init__(self, plan: Plan, fleet: Fleet) -> None:
        self.plan = plan
        self.fleet = fleet
        self.prefix = f"conformance-{secrets.token_hex(4)}-"
        self.replays: list[tuple[Response, Response]] = []
        self.refusals: list[tuple[Response, Refusal, str]] = []
        self._numbers = count(1)

    def new_key(self) -> str:
        """Return a fresh key."""
        return f"{self.prefix}{next(self._numbers)}"

    async def post(self, body: bytes, *keys: str, target: str | None = None, method: str = "POST") -> Response:
        """Send a request with one key header for each of `keys`.

        Repeats it while the guard answers that its check is unavailable: such a request was not run. Raises NoAnswer,
        CouldNotRun.
        """
        end = time.monotonic() + self.fleet.timeout_s
        headers = [(KEY_HEADER, key) for key in keys]
        while True:
            response = await self.fleet.send(method, target or self.plan.route, body, headers)
            if refusal_of(response) is not UNAVAILABLE:
                return response
            if time.monotonic() > end:
                raise CouldNotRun(f"{response.base_url} answers 503: its check for duplicates is unavailable")
            await asyncio.sleep(RETRY_S)

    async def run_first(self, body: bytes | None = None) -> tuple[str, Response]:
        """Send the first request with a fresh key. Raises CouldNotRun if it does not run."""
        key = self.new_key()
        response = await self.post(self.plan.body if body is None else body, key)
        if not ran(response):
            raise CouldNotRun(f"{described(response)} to the first request; it must be 2xx or 3xx")
        return key, response

    def expect_refusal(self, response: Response, refusal: Refusal, key: str) -> None:
        """Keep a refusal for the checks of documents. Raises Failed if the response has another status."""
        if response.status != refusal.status:
            raise Failed(f"{described(response)}; it must be {refusal.status} {refusal.heading}")
        self.refusals.append((response, refusal, key))


def ran(response: Response) -> bool:
    """Return whether a response shows that the service did the work."""
    return 200 <= response.status < 400 and not is_replay(response) and refusal_of(response) is None


def described(response: Response) -> str:
    """Return the process, status and kind of a response in words."""
    refusal = refusal_of(response)
    kind = f" {refusal.heading}" if refusal is not None else " as a replay" if is_replay(response) else ""
    return f"{response.base_url} answered {response.status}{kind}"


def expect_replay(first: Response, repeat: Response) -> None:
    """Raises Failed unless `repeat` has the status and body of `first`."""
    if repeat.status != first.status:
        raise Failed(f"{described(repeat)}; the first answer was {first.status}")
    if repeat.body != first.body:
        again = "" if is_replay(repeat) else ": the request ran again"
        raise Failed(f"{described(repeat)} with another body than the first answer{again}")


def expect_another_transaction(response: Response, request: str) -> None:
    """Raises Failed if the response belongs to an earlier transaction, Skipped if it cannot show that."""
    if is_replay(response) or refusal_of(response) is not None:
        raise Failed(f"{described(response)} to {request}; it must be a transaction of its own")
    if response.status in NOT_REACHABLE:
        raise Skipped(f"not reachable: {described(response)} to {request}")


async def together(requests: Sequence[Coroutine[Any, Any, Response]]) -> list[Response]:
    """Return the responses to concurrent requests. Raises the first failure when all have ended."""
    responses: list[Response] = []
    for result in await asyncio.gather(*requests, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
        responses.append(result)
    return responses


def changed(body: bytes) -> bytes | None:
    """Return another body with the same members and one more, None if `body` is not a JSON object."""
    try:
        members = json.loads(body)
    except ValueError:
        return None
    return json.dumps({**members, "conformance": "another body"}).encode() if isinstance(members, dict) else None
