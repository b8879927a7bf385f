"""Django middleware that handles a request with an Idempotency-Key once."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Self, Unpack

from asgiref.sync import sync_to_async
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase

from dedup import aio, asgi, wsgi
from dedup.client import Client
from dedup.errors import DedupError
from dedup.http_profile import (
    InvalidKey,
    Outcome,
    Response,
    body_too_large,
    content_length,
    is_event_stream,
    key_invalid,
)
from dedup.idempotency import Options, Request, Rules, end, end_async, handling

Handler = Callable[[HttpRequest], Any]


class IdempotencyMiddleware:
    """Passes on the first request with an Idempotency-Key, and replays its response to the others.

    Name an instance in `MIDDLEWARE`. With a `dedup.Client` it is a blocking middleware, for WSGI; with a
    `dedup.aio.Client` an asynchronous one, for ASGI. `dedup.idempotency.Rules` describes the options. The claim ends
    before the last byte of the response is sent. A streaming response, and one that is too large to store, is passed
    on and not replayed. An exception of a view arrives as a 500 response.
    """

    def __init__(self, client: Client | aio.Client, **options: Unpack[Options]) -> None:
        self.async_capable = isinstance(client, aio.Client)
        self.sync_capable = not self.async_capable
        self._client: Any = client
        self._rules = Rules(**options)

    def __call__(self, get_response: Handler) -> Handler:
        """Return the middleware around the next handler, as Django asks for."""
        if self.async_capable:

            async def handle_async(request: HttpRequest) -> HttpResponseBase:
                return await self._handle_async(request, get_response)

            return handle_async
        return lambda request: self._handle(request, get_response)

    def _handle(self, request: HttpRequest, get_response: Handler) -> HttpResponseBase:
        prepared = self._prepare(request)
        if prepared is None:
            return get_response(request)
        if isinstance(prepared, HttpResponse):
            return prepared
        try:
            claim = self._client.claim(prepared[0], **prepared[1])
        except DedupError as error:
            return _response(self._rules.answer_to(error))
        with handling(claim, self._rules.retention):
            try:
                response = get_response(request)
            except BaseException:
                end(claim, "keep", bytes)
                raise
        if response.streaming:
            response.streaming_content = wsgi.Passed(
                iter(response.streaming_content),
                None,
                content_length(response.items()),
                lambda does: end(claim, does or self._outcome(response), lambda: self._stored(response)),
            )
        else:
            end(claim, self._outcome(response), lambda: self._stored(response))
        return response

    async def _handle_async(self, request: HttpRequest, get_response: Handler) -> HttpResponseBase:
        prepared = self._prepare(request)
        if prepared is None:
            return await get_response(request)
        if isinstance(prepared, HttpResponse):
            return prepared
        try:
            claim = await self._client.claim(prepared[0], **prepared[1])
        except DedupError as error:
            return _response(self._rules.answer_to(error))
        with handling(claim, self._rules.retention):
            try:
                response = await get_response(request)
            except BaseException:
                await end_async(claim, "keep", bytes)
                raise

        async def ending(does: Outcome | None) -> None:
            await end_async(claim, does or self._outcome(response), lambda: self._stored(response))

        if response.streaming:
            response.streaming_content = _Passed(_chunks(response), content_length(response.items()), ending)
        else:
            await ending(None)
        return response

    def _prepare(self, request: HttpRequest) -> tuple[str, dict[str, Any]] | HttpResponse | None:
        """Return the id and the options of the claim, the refusal of the request, or None if it is not guarded."""
        scope = getattr(request, "scope", None)
        keys = wsgi.keys_of(request.META) if scope is None else asgi.keys_of(scope)

        def made() -> Request:
            if scope is not None:
                return asgi.request_of(scope, request)
            return wsgi.request_of(request.META, request, decoded=request.path)

        try:
            guarded = self._rules.guarded(request.method, keys, made)
        except InvalidKey as error:
            return _response(key_invalid(error))
        if guarded is None:
            return None
        limit = self._rules.max_body_bytes
        # Checked first: Django reads the whole body, and refuses to above a limit of its own.
        if (content_length(request.headers.items()) or 0) > limit or len(request.body) > limit:
            return _response(body_too_large(limit))
        return guarded[1], self._rules.claim_options(guarded[0], request.body)

    def _outcome(self, response: HttpResponseBase) -> Outcome:
        return self._rules.outcome(response.status_code)

    def _stored(self, response: HttpResponseBase) -> bytes:
        body = b"" if response.streaming else response.content
        headers = tuple(response.items())
        streamed = response.streaming or is_event_stream(headers)
        return self._rules.stored(Response(response.status_code, headers, body), streamed=streamed)


class _Passed(AsyncIterator[bytes]):
    """`dedup.wsgi.Passed` for an asynchronous response."""

    def __init__(
        self, chunks: AsyncIterator[bytes], length: int | None, end: Callable[[Outcome | None], Awaitable[None]]
    ) -> None:
        self._chunks = chunks
        self._left = length
        self._end: Callable[[Outcome | None], Awaitable[None]] | None = end
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            await self._end_once(None)
            raise
        except BaseException:
            await self._end_once("keep")
            raise
        if self._left is not None:
            self._left -= len(chunk)
            # The caller has the whole response once its Content-Length is reached.
            if self._left <= 0:
                await self._end_once(None)
        return chunk

    def close(self) -> None:
        """Keep the claim of a caller that left before the end. Django calls this in another thread."""
        if self._end is not None:
            asyncio.run_coroutine_threadsafe(self._end_once("keep"), self._loop)

    async def _end_once(self, does: Outcome | None) -> None:
        end, self._end = self._end, None
        if end is not None:
            await end(does)


def _chunks(response: Any) -> AsyncIterator[bytes]:
    if response.is_async:
        chunks: AsyncIterator[bytes] = response.streaming_content
        return chunks

    async def in_thread(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
        whole = await sync_to_async(lambda: list(chunks))()
        for chunk in whole:
            yield chunk

    return in_thread(response.streaming_content)


def _response(made: Response) -> HttpResponse:
    response = HttpResponse(made.body, status=made.status)
    del response["content-type"]
    for name, value in made.sent_headers:
        # Django keeps one value for each name.
        response[name] = f"{response[name]}, {value}" if name in response else value
    return response
