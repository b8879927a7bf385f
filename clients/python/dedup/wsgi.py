"""WSGI middleware that handles a request with an Idempotency-Key once (Flask and others)."""

import io
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self, Unpack

from dedup.client import Claim, Client
from dedup.errors import DedupError
from dedup.http_profile import (
    InvalidKey,
    Outcome,
    Response,
    body_too_large,
    content_length,
    decoded_path,
    is_event_stream,
    key_invalid,
    path_of,
)
from dedup.idempotency import Options, Request, Rules, end, handling

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class IdempotencyMiddleware:
    """Passes on the first request with an Idempotency-Key, and replays its response to the others.

    `dedup.idempotency.Rules` describes the options. The claim ends before the last byte of the response is sent, so
    callers with the response cannot repeat the work. An event stream, and a response that is too large to store, are
    passed on at once and not replayed. All other responses are held back until they are complete.
    """

    def __init__(self, app: "WSGIApplication", client: Client, **options: Unpack[Options]) -> None:
        self._app = app
        self._client = client
        self._rules = Rules(**options)

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        """Handle one request. Requests without a key pass unchanged."""
        try:
            guarded = self._rules.guarded(
                environ["REQUEST_METHOD"], keys_of(environ), lambda: request_of(environ, environ)
            )
        except InvalidKey as error:
            return _respond(start_response, key_invalid(error))
        if guarded is None:
            return self._app(environ, start_response)
        request, claim_id = guarded
        body = _whole_body(environ, self._rules.max_body_bytes)
        if body is None:
            return _respond(start_response, body_too_large(self._rules.max_body_bytes))
        environ["wsgi.input"] = io.BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        try:
            claim = self._client.claim(claim_id, **self._rules.claim_options(request, body))
        except DedupError as error:
            return _respond(start_response, self._rules.answer_to(error))
        with handling(claim, self._rules.retention):
            return self._handle(claim, environ, start_response)

    def _handle(self, claim: Claim, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        started = _Started()
        chunks: Iterable[bytes] = ()
        try:
            chunks = self._app(environ, started.start_response)
            parts = iter(chunks)
            for part in parts:
                started.body += part
                if len(started.body) > self._rules.max_stored_bytes or is_event_stream(started.headers):
                    started.pass_on(start_response)
                    rest = _with_first(bytes(started.body), parts)
                    return Passed(
                        rest, chunks, content_length(started.headers), lambda does: self._end(claim, started, does)
                    )
            _close(chunks)
        except BaseException:
            end(claim, "keep", bytes)
            _close(chunks)
            raise
        self._end(claim, started, None)
        start_response(started.status, started.headers)
        return [bytes(started.body)]

    def _end(self, claim: Claim, started: "_Started", does: Outcome | None) -> None:
        status = int(started.status.split(" ", 1)[0])
        headers = tuple((name.lower(), value) for name, value in started.headers)
        response = Response(status, headers, bytes(started.body))
        end(
            claim,
            does or self._rules.outcome(status),
            lambda: self._rules.stored(response, streamed=started.passed is not None),
        )


class _Started:
    """Buffers what the application starts, writes and returns, until it is passed on."""

    def __init__(self) -> None:
        self.status = ""
        self.headers: list[tuple[str, str]] = []
        self.body = bytearray()
        self.passed: StartResponse | None = None

    def start_response(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        """Keep status and headers. A second call, after an error, replaces them, or fails once they are sent."""
        if self.passed is not None:
            return self.passed(status, headers, exc_info)
        self.status = status
        self.headers = headers
        return self._write

    def _write(self, data: bytes) -> None:
        if self.passed is None:
            self.body += data
        else:
            self._write_on(data)

    def pass_on(self, start_response: "StartResponse") -> None:
        """Send status and headers."""
        self._write_on = start_response(self.status, self.headers)
        self.passed = start_response


class Passed(Iterator[bytes]):
    """The chunks of a response that is passed on. `end` receives None after the last one, and "keep" without it."""

    def __init__(
        self,
        chunks: Iterator[bytes],
        source: object,
        length: int | None,
        end: Callable[[Outcome | None], None],
    ) -> None:
        self._chunks = chunks
        self._source = source
        self._left = length
        self._end: Callable[[Outcome | None], None] | None = end

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        try:
            chunk = next(self._chunks)
        except StopIteration:
            self._end_once(None)
            raise
        except BaseException:
            self._end_once("keep")
            raise
        if self._left is not None:
            self._left -= len(chunk)
            # The caller has the whole response once its Content-Length is reached.
            if self._left <= 0:
                self._end_once(None)
        return chunk

    def close(self) -> None:
        """Close the application's iterable. The caller may have left before its end."""
        try:
            _close(self._source)
        finally:
            self._end_once("keep")

    def _end_once(self, does: Outcome | None) -> None:
        end, self._end = self._end, None
        if end is not None:
            end(does)


def keys_of(environ: "WSGIEnvironment") -> list[str]:
    """Return the value of the key header; servers join several with commas."""
    return [environ["HTTP_IDEMPOTENCY_KEY"]] if "HTTP_IDEMPOTENCY_KEY" in environ else []


def request_of(environ: "WSGIEnvironment", native: object, decoded: str | None = None) -> Request:
    """Return the request of an environ. Raises InvalidKey if its path is not UTF-8.

    A framework that has decoded the path in the environ passes it as `decoded`.
    """
    headers = {name[5:].replace("_", "-").lower(): v for name, v in environ.items() if name.startswith("HTTP_")}
    if environ.get("CONTENT_TYPE"):
        headers["content-type"] = environ["CONTENT_TYPE"]
    query = environ.get("QUERY_STRING", "").encode("latin-1")
    return Request(environ["REQUEST_METHOD"], _path(environ, decoded), query, headers, native)


def _path(environ: "WSGIEnvironment", decoded: str | None) -> str:
    target = environ.get("REQUEST_URI") or environ.get("RAW_URI")
    if target:
        return path_of(target.encode("latin-1"))
    if decoded is not None:
        return decoded
    # WSGI decodes the bytes of the path as Latin-1.
    return decoded_path((environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin-1"))


def _with_first(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _close(chunks: object) -> None:
    close = getattr(chunks, "close", None)
    if close is not None:
        close()


def _whole_body(environ: "WSGIEnvironment", limit: int) -> bytes | None:
    """Return the body, None if it is larger than `limit`."""
    length = environ.get("CONTENT_LENGTH") or ""
    if not length and not environ.get("wsgi.input_terminated"):
        return b""
    if length and int(length) > limit:
        return None
    body: bytes = environ["wsgi.input"].read(int(length) if length else limit + 1)
    return body if len(body) <= limit else None


def _respond(start_response: "StartResponse", response: Response) -> list[bytes]:
    start_response(f"{response.status} {_phrase(response.status)}", list(response.sent_headers))
    return [response.body]


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
