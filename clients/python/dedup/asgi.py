"""ASGI middleware that handles a request with an Idempotency-Key once (FastAPI, Starlette and others)."""

from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any

from dedup import aio
from dedup.calls import Span
from dedup.errors import DedupError
from dedup.handles import log_failed_ending
from dedup.idempotency import TOO_LARGE, Response, Rules, answer_to, fingerprint, pack, problem, worth_completing

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class IdempotencyMiddleware:
    """Passes on the first request with an Idempotency-Key, and replays its response to the others.

    `dedup.idempotency.Rules` describes the options. The claim is completed before the response's last byte is sent, so
    callers with the response cannot repeat the work. A server error or an exception releases the claim; any other
    response completes it.
    """

    def __init__(
        self,
        app: App,
        client: aio.Client,
        *,
        ttl: Span | None = None,
        retention: Span | None = None,
        namespace: str | None = None,
        methods: Collection[str] = ("POST", "PATCH"),
        required: bool = False,
        caller: Callable[[Mapping[str, str]], str] | None = None,
        max_body_bytes: int = 1024 * 1024,
    ) -> None:
        self._app = app
        self._client = client
        self._rules = Rules(
            ttl=ttl,
            retention=retention,
            namespace=namespace,
            methods=methods,
            required=required,
            caller=caller,
            max_body_bytes=max_body_bytes,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection. Other protocols and requests without a key pass unchanged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            claim_id = self._rules.claim_id(scope["method"], scope["path"], headers)
        except ValueError as error:
            await _respond(send, problem(400, str(error)))
            return
        if claim_id is None:
            await self._app(scope, receive, send)
            return
        try:
            body = await _whole_body(receive, self._rules.max_body_bytes)
        except ValueError as error:
            await _respond(send, problem(413, str(error)))
            return
        if body is None:
            return
        try:
            claim = await self._client.claim(
                claim_id, ttl=self._rules.ttl, namespace=self._rules.namespace, fingerprint=fingerprint(body)
            )
        except DedupError as error:
            await _respond(send, answer_to(error))
            return
        claim.retention = self._rules.retention
        responder = _Responder(claim, send)
        # Extensions could send a response around the responder.
        guarded = {**scope, "extensions": {}}
        try:
            await self._app(guarded, _replay(body, receive), responder.send)
        except Exception:
            await responder.fail()
            raise
        await responder.flush()


class _Responder:
    """Holds back the response until the claim has ended or the response is too large to store."""

    def __init__(self, claim: aio.Claim, send: Send) -> None:
        self._claim = claim
        self._send = send
        self._held: list[Message] = []
        self._body = bytearray()
        self._start: Message = {}
        self._streaming = False
        self._ended = False

    async def send(self, message: Message) -> None:
        """Take a message from the application."""
        if message["type"] == "http.response.start":
            self._start = message
        if message["type"] == "http.response.body" and not self._ended:
            self._body += message.get("body", b"") if not self._streaming else b""
            if not message.get("more_body", False):
                await self._end()
        if not self._ended and not self._streaming:
            self._held.append(message)
            # Stream a response that is too large to store.
            if self._response_bytes() == TOO_LARGE:
                self._streaming = True
                await self.flush()
            return
        await self.flush()
        await self._send(message)

    async def fail(self) -> None:
        """Release the claim, unless the response was complete."""
        if not self._ended:
            self._ended = True
            await self._quietly(self._claim.release())

    async def _end(self) -> None:
        self._ended = True
        if worth_completing(self._start["status"]):
            await self._quietly(self._claim.complete(self._response_bytes()))
        else:
            await self._quietly(self._claim.release())

    def _response_bytes(self) -> bytes:
        if self._streaming:
            return TOO_LARGE
        headers = tuple((k.decode("latin-1").lower(), v.decode("latin-1")) for k, v in self._start.get("headers", ()))
        return pack(Response(self._start["status"], headers, bytes(self._body)))

    async def flush(self) -> None:
        """Send the held messages."""
        held, self._held = self._held, []
        for message in held:
            await self._send(message)

    async def _quietly(self, ending: Awaitable[object]) -> None:
        """Complete or release the claim. Failures are only logged: the response is sent anyway."""
        try:
            await ending
        except DedupError as error:
            log_failed_ending(self._claim, error)


async def _whole_body(receive: Receive, limit: int) -> bytes | None:
    """Return the body, None if the caller disconnected. Raises ValueError if it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise ValueError(f"The request body may have up to {limit} bytes.")
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that returns the body once and then delegates."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _respond(send: Send, response: Response) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response.headers]
    headers.append((b"content-length", str(len(response.body)).encode()))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
