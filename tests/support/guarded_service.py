"""A reward service behind the ASGI guard, in this process, and ways to break it for tests of conformance checks."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Unpack

import uvicorn

from dedup.asgi import IdempotencyMiddleware, Message, Receive, Scope, Send
from dedup.idempotency import Options
from dedup.testing import AsyncFakeClient
from tests.support.polling import eventually

CLAIMANT = "rewards-under-test"
KEY = b"idempotency-key"

BODY = {"amount": 5}
REJECTED = {"amount": 0}
FAILING = {"amount": 5, "simulate": "error"}
SLOW = {"amount": 5, "simulate": "slow"}
LARGE = {"amount": 5, "simulate": "large"}
LARGE_WITH_LOCATION = {"amount": 5, "simulate": "large", "location": True}

ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Wrap = Callable[[ASGIApp], ASGIApp]
Headers = list[tuple[bytes, bytes]]


class Rewards:
    """Pays rewards. A slow payment ends when two other requests with its key were answered, or one entered too."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._answered: Counter[bytes] = Counter()
        self._entered: Counter[bytes] = Counter()

    def outside(self, app: ASGIApp) -> ASGIApp:
        """Count the answers for each key as the caller sent it."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            key = b", ".join(keys_of(scope))
            await app({**scope, "sent_key": key}, receive, send)
            self._answered[key] += 1

        return counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if scope["method"] == "GET":
            await respond(send, 200, [], b"[]")
            return
        order, key = json.loads(body), scope["sent_key"]
        if order.get("amount", 0) <= 0:
            await respond(send, 400, [], b"{}")
            return
        if order.get("simulate") == "slow":
            self._entered[key] += 1
            await eventually(lambda: self._may_end(key))
        number = next(self._numbers)
        if order.get("simulate") == "error":
            await respond(send, 500, [], b"{}")
            return
        location = (b"location", b"/rewards/%d" % number)
        large = order.get("simulate") == "large"
        headers = [(b"etag", b'"%d"' % number), (b"set-cookie", b"session=%d" % number)]
        if not large or order.get("location"):
            headers.append(location)
        await respond(send, 201, headers, json.dumps({"id": number, "padding": "x" * 5000 * large}).encode())

    async def _may_end(self, key: bytes) -> bool:
        return self._answered[key] > 2 or self._entered[key] > 1


def guarded(wrap: Wrap = lambda app: app, *, rewards: Rewards | None = None, **options: Unpack[Options]) -> ASGIApp:
    """Return the service behind a guard of its own with `options`, which `wrap` breaks."""
    rewards = rewards or Rewards()
    guard = IdempotencyMiddleware(rewards, AsyncFakeClient(claimant=CLAIMANT), **options)
    return rewards.outside(wrap(guard))


@asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[str]:
    """Serve on a free port of this host, and yield the address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="critical"))
    serving = asyncio.ensure_future(server.serve())

    async def started() -> bool:
        return server.started

    await eventually(started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


def keys_of(scope: Scope) -> list[bytes]:
    """Return the values of the key headers."""
    return [value for name, value in scope["headers"] if name == KEY]


async def respond(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send a JSON response."""
    length = (b"content-length", b"%d" % len(body))
    headers = [(b"content-type", b"application/json"), *headers, length]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def rescoped(change: Callable[[Scope], dict[str, Any]]) -> Wrap:
    """Return a fault that replaces parts of the scope."""

    def wrap(app: ASGIApp) -> ASGIApp:
        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, **change(scope)}, receive, send)

        return wrapped

    return wrap


def rekeyed(change: Callable[[list[bytes]], list[bytes]]) -> Wrap:
    """Return a fault that replaces the keys of a request."""

    def headers(scope: Scope) -> dict[str, Any]:
        others = [header for header in scope["headers"] if header[0] != KEY]
        return {"headers": [*others, *((KEY, key) for key in change(keys_of(scope)))]}

    return rescoped(headers)


def altered(change: Callable[[int, dict[bytes, bytes], bytes, bytes], tuple[int, dict[bytes, bytes], bytes]]) -> Wrap:
    """Return a fault that replaces status, headers and body of a response. The last argument is the key as sent."""

    def wrap(app: ASGIApp) -> ASGIApp:
        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            messages: list[Message] = []

            async def collect(message: Message) -> None:
                messages.append(message)

            await app(scope, receive, collect)
            body = b"".join(message.get("body", b"") for message in messages)
            start = messages[0]
            found = {name.lower(): value for name, value in start["headers"]}
            status, headers, body = change(start["status"], found, body, scope["sent_key"])
            if b"content-length" in headers:
                headers[b"content-length"] = b"%d" % len(body)
            await send({"type": "http.response.start", "status": status, "headers": list(headers.items())})
            await send({"type": "http.response.body", "body": body})

        return wrapped

    return wrap
