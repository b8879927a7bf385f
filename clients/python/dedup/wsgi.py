"""WSGI middleware that handles a request with an Idempotency-Key once (Flask, Django and others)."""

import io
from collections.abc import Callable, Collection, Iterable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from dedup.calls import Span
from dedup.client import Claim, Client
from dedup.errors import DedupError
from dedup.handles import log_failed_ending
from dedup.idempotency import Response, Rules, answer_to, fingerprint, pack, problem, worth_completing

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class IdempotencyMiddleware:
    """Passes on the first request with an Idempotency-Key, and replays its response to the others.

    `dedup.idempotency.Rules` describes the options. A guarded response is buffered and its claim completed before it is
    sent, so callers with the response cannot repeat the work. A server error or an exception releases the claim; any
    other response completes it.
    """

    def __init__(
        self,
        app: "WSGIApplication",
        client: Client,
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

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Handle one request. Requests without a key pass unchanged."""
        headers = {name[5:].replace("_", "-").lower(): v for name, v in environ.items() if name.startswith("HTTP_")}
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        try:
            claim_id = self._rules.claim_id(environ["REQUEST_METHOD"], path, headers)
        except ValueError as error:
            return _respond(start_response, problem(400, str(error)))
        if claim_id is None:
            return self._app(environ, start_response)
        body = _whole_body(environ, self._rules.max_body_bytes)
        if body is None:
            return _respond(
                start_response, problem(413, f"The request body may have up to {self._rules.max_body_bytes} bytes.")
            )
        environ["wsgi.input"] = io.BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        try:
            claim = self._client.claim(
                claim_id, ttl=self._rules.ttl, namespace=self._rules.namespace, fingerprint=fingerprint(body)
            )
        except DedupError as error:
            return _respond(start_response, answer_to(error))
        claim.retention = self._rules.retention
        return self._handle(claim, environ, start_response)

    def _handle(self, claim: Claim, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        buffered = _Buffered()
        try:
            chunks = self._app(environ, buffered.start_response)
            try:
                buffered.body += b"".join(chunks)
            finally:
                close = getattr(chunks, "close", None)
                if close is not None:
                    close()
        except Exception:
            _quietly(claim, claim.release)
            raise
        response = buffered.response()
        if worth_completing(response.status):
            _quietly(claim, lambda: claim.complete(pack(response)))
        else:
            _quietly(claim, claim.release)
        start_response(buffered.status, buffered.headers)
        return [response.body]


class _Buffered:
    """Buffers the application's returned or written response."""

    def __init__(self) -> None:
        self.status = ""
        self.headers: list[tuple[str, str]] = []
        self.body = bytearray()

    def start_response(
        self, status: str, headers: list[tuple[str, str]], _exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        """Keep status and headers. A second call, after an error, replaces them."""
        self.status = status
        self.headers = headers
        return self.body.extend

    def response(self) -> Response:
        """Return the complete response."""
        headers = tuple((name.lower(), value) for name, value in self.headers)
        return Response(int(self.status.split(" ", 1)[0]), headers, bytes(self.body))


def _whole_body(environ: "WSGIEnvironment", limit: int) -> bytes | None:
    """Return the body, None if it is larger than `limit`."""
    length = environ.get("CONTENT_LENGTH") or ""
    if not length and not environ.get("wsgi.input_terminated"):
        return b""
    size = min(int(length), limit + 1) if length else limit + 1
    body: bytes = environ["wsgi.input"].read(size)
    return body if len(body) <= limit else None


def _respond(start_response: "StartResponse", response: Response) -> list[bytes]:
    status = f"{response.status} {HTTPStatus(response.status).phrase}"
    start_response(status, [*response.headers, ("content-length", str(len(response.body)))])
    return [response.body]


def _quietly(claim: Claim, ending: Callable[[], object]) -> None:
    """Complete or release the claim. Failures are only logged: the response is sent anyway."""
    try:
        ending()
    except DedupError as error:
        log_failed_ending(claim, error)
