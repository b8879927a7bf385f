"""Requests to the processes of a service, sent exactly as given, and their responses."""

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx


class NoAnswer(Exception):
    """A request has no response; the message says why."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response, with its headers as received."""

    base_url: str
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def values(self, name: str) -> list[str]:
        """Return the values of a header, in their order."""
        return [value for found, value in self.headers if found.lower() == name.lower()]


class Fleet:
    """The processes of one service. Successive requests go to successive processes."""

    def __init__(self, base_urls: Sequence[str], headers: Sequence[tuple[str, str]], timeout_s: float) -> None:
        self.base_urls = tuple(url.rstrip("/") for url in base_urls)
        self.timeout_s = timeout_s
        self._headers = tuple(headers)
        self._next = 0
        self._client = httpx.AsyncClient(
            timeout=None,  # noqa: S113 - `send` limits the whole request.
            verify=ssl.create_default_context(),
            # A connection that the service closes while idle would lose a request.
            limits=httpx.Limits(max_keepalive_connections=0),
            # A proxy could change paths and headers.
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    def start_at(self, process: int) -> None:
        """Send the next request to this process, counted from 0 and beyond the last to the first again."""
        self._next = process

    async def send(
        self, method: str, target: str, body: bytes | None, headers: Sequence[tuple[str, str]] = ()
    ) -> Response:
        """Send one request, without following redirects. Raises NoAnswer.

        The path and the headers travel as given, doubled headers too.
        """
        base_url = self.base_urls[self._next % len(self.base_urls)]
        self._next += 1
        common = [("Accept", "*/*"), ("Accept-Encoding", "identity"), ("User-Agent", "dedup-service-conformance")]
        given = {name.lower() for name, _ in self._headers}
        if body is not None and "content-type" not in given:
            common.append(("Content-Type", "application/json"))
        sent = [header for header in common if header[0].lower() not in given]
        request = httpx.Request(method, base_url + target, headers=[*sent, *self._headers, *headers], content=body)
        try:
            async with asyncio.timeout(self.timeout_s):
                response = await self._client.send(request)
        except TimeoutError:
            raise NoAnswer(f"{base_url} did not answer within {self.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise NoAnswer(f"{base_url} did not answer: {str(error) or type(error).__name__}") from None
        received = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers.raw)
        return Response(base_url, response.status_code, received, response.content)
