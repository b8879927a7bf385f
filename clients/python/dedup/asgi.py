"""ASGI middleware that handles a request with an Idempotency-Key once (FastAPI, Starlette and others)."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Unpack

from dedup import aio
from dedup.errors import DedupError
from dedup.http_profile import (
    KEY_HEADER,
    InvalidKey,
    Response,
    body_too_large,
    content_length,
    decoded_path,
    is_event_stream,
    key_invalid,
    path_of,
)
from dedup.idempotency import Options, Request, Rules, end_async, handling

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class IdempotencyMiddleware:
    """Passes on the first request with an Idempotency-Key, and replays its response to the others.

    `dedup.idempotency.Rules` describes the options. The claim ends before the last byte of the response is sent, so
    callers with the response cannot repeat the work. An event stream, and a response that is too large to store, are
    passed on at once and not replayed. All other responses are held back until they are complete.
    """

    def __init__(self, app: App, client: aio.Client, **options: Unpack[Options]) -> None:
        self._app = app
        self._client = client
        self._rules = Rules(**options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection. Other protocols and requests without a key pass unchanged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            guarded = self._rules.guarded(scope["method"], keys_of(scope), lambda: request_of(scope, scope))
        except InvalidKey as error:
            await _respond(send, key_invalid(error))
            return
        if guarded is None:
            await self._app(scope, receive, send)
            return
        request, claim_id = guarded
        try:
            body = await _whole_body(receive, self._rules.max_body_bytes)
        except _TooLarge:
            await _respond(send, body_too_large(self._rules.max_body_bytes))
            return
        if body is None:
            return
        try:
            claim = await self._client.claim(claim_id, **self._rules.claim_options(request, body))
        except DedupError as error:
            await _respond(send, self._rules.answer_to(error))
            return
        await self._handle(claim, scope, _replay(body, receive), send)

    async def _handle(self, claim: aio.Claim, scope: Scope, receive: Receive, send: Send) -> None:
        responder = _Responder(claim, self._rules, send)
        with handling(claim, self._rules.retention):
            try:
                # Extensions could send a response around the responder.
                await self._app({**scope, "extensions": {}}, receive, responder.send)
            except BaseException:
                await responder.keep()
                raise
        await responder.keep()
        await responder.flush()


class _Responder:
    """Holds back the response until the claim has ended, unless it is an event stream or too large to store."""

    def __init__(self, claim: aio.Claim, rules: Rules, send: Send) -> None:
        self._claim = claim
        self._rules = rules
        self._send = send
        self._held: list[Message] = []
        self._status = 0
        self._headers: tuple[tuple[str, str], ...] = ()
        self._length: int | None = None
        self._body = bytearray()
        self._size = 0
        self._streamed = False
        self._ended = False

    async def send(self, message: Message) -> None:
        """Take a message from the application."""
        self._held.append(message)
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = tuple(_text(name, value) for name, value in message.get("headers", ()))
            self._length = content_length(self._headers)
            self._streamed = is_event_stream(self._headers)
        elif message["type"] == "http.response.body" and not self._ended:
            await self._take(message.get("body", b""), more=message.get("more_body", False))
        if self._streamed or self._ended:
            await self.flush()

    async def _take(self, part: bytes, *, more: bool) -> None:
        self._size += len(part)
        if not self._streamed:
            self._body += part
        # The caller has the whole response once its Content-Length is reached.
        if not more or (self._length is not None and self._size >= self._length):
            self._ended = True
            await end_async(self._claim, self._rules.outcome(self._status), self._stored)
        elif self._size > self._rules.max_stored_bytes:
            self._streamed = True
            self._body.clear()

    def _stored(self) -> bytes:
        return self._rules.stored(Response(self._status, self._headers, bytes(self._body)), streamed=self._streamed)

    async def keep(self) -> None:
        """Keep the claim, unless the response was complete."""
        if not self._ended:
            self._ended = True
            await end_async(self._claim, "keep", self._stored)

    async def flush(self) -> None:
        """Send the held messages."""
        held, self._held = self._held, []
        for message in held:
            await self._send(message)


def keys_of(scope: Scope) -> list[str]:
    """Return the values of the key headers."""
    return [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == KEY_HEADER.encode()]


def request_of(scope: Scope, native: object) -> Request:
    """Return the request of a scope. Raises InvalidKey if its path is not UTF-8."""
    headers: dict[str, str] = {}
    for name, value in (_text(*header) for header in scope["headers"]):
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return Request(scope["method"], _path(scope), scope.get("query_string", b""), headers, native)


def _path(scope: Scope) -> str:
    raw = scope.get("raw_path")
    if raw:
        return path_of(raw)
    root, path = scope.get("root_path", ""), scope["path"]
    # Not every server repeats the mounted prefix in the path.
    whole: str = path if path.startswith(root) else root + path
    return decoded_path(whole.encode("utf-8", "surrogateescape"))


def _text(name: bytes, value: bytes) -> tuple[str, str]:
    return name.decode("latin-1").lower(), value.decode("latin-1")


class _TooLarge(Exception):
    pass


async def _whole_body(receive: Receive, limit: int) -> bytes | None:
    """Return the body, None if the caller disconnected. Raises _TooLarge."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise _TooLarge
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that returns the body once and then delegates."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _respond(send: Send, response: Response) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response.sent_headers]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
