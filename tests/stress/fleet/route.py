"""The route of the fleet: a round-robin HTTP proxy that loses replies by a seeded plan, and records every attempt."""

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from typing import Self

import h11
import httpx

from tests.stress.fleet.history import ANSWERED, BROKEN, CUT, REFUSED, Attempt, History
from tests.stress.fleet.services import Service

_LOST_CHANCE = 0.10
_CUT_CHANCE = 0.05
_LONGEST_UNTIL_CUT_S = 0.4
# Longer than any work: it ends a request that hangs.
_TIMEOUT_S = 300.0


class Route:
    """Forwards each request to the next service, once. Each key has a turn of its own, which the seed begins.

    It closes the caller's connection without the answer, after the service answered (`lost`) or before it did, then
    with the connection to the service (`cut`), as proxies do when their caller leaves. It answers 502 for a service
    that refuses the connection or closes it.
    """

    def __init__(self, services: list[Service], history: History, seed: int) -> None:
        self._services = services
        self._history = history
        self._seed = seed
        self._turns: dict[str, itertools.cycle[Service]] = {}
        self._attempts: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        # Each request has a connection of its own, so a failure is that of this request.
        self._client = httpx.AsyncClient(
            timeout=_TIMEOUT_S, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)
        )
        self.in_flight: Counter[str] = Counter()
        """Requests that each service has not answered."""
        self.losing = True
        self.cutting = True
        self.auditing = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    @property
    def url(self) -> str:
        """The base URL of the route."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def begin_with(self, key: str, service: Service) -> None:
        """Send the first request of a key to this service."""
        first = self._services.index(service)
        self._turns[key] = itertools.cycle([*self._services[first:], *self._services[:first]])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            request, body = await _receive(reader)
            answer = await self._forward(request, body)
            if answer is None:
                writer.transport.abort()
            else:
                writer.write(_encoded(answer))
                await writer.drain()
        except (OSError, EOFError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _forward(self, request: h11.Request, body: bytes) -> httpx.Response | None:
        """Return what the caller receives; None if its connection closes instead."""
        headers = [(name.decode(), value.decode()) for name, value in request.headers]
        key = dict(headers)["idempotency-key"]
        self._attempts[key] += 1
        chance = random.Random(f"{self._seed} {key} {self._attempts[key]}")
        if key not in self._turns:
            self.begin_with(key, random.Random(f"{self._seed} {key}").choice(self._services))
        service = next(self._turns[key])
        loses = self.losing and chance.random() < _LOST_CHANCE
        cut_after_s = chance.uniform(0, _LONGEST_UNTIL_CUT_S)
        cuts = self.cutting and not loses and chance.random() < _CUT_CHANCE
        begin_ns = time.monotonic_ns()
        answer: httpx.Response | None = None
        self.in_flight[service.name] += 1
        try:
            async with asyncio.timeout(cut_after_s if cuts else None):
                answer = await self._client.request(
                    request.method.decode(), service.url + request.target.decode(), headers=headers, content=body
                )
                ending = ANSWERED
        except httpx.ConnectError:
            ending = REFUSED
        except httpx.TransportError:
            ending = BROKEN
        except TimeoutError:
            # An answer that came at the last moment was received.
            ending = CUT if answer is None else ANSWERED
        finally:
            self.in_flight[service.name] -= 1
        self._history.attempts.append(
            Attempt(
                key=key,
                service=service.name,
                begin_ns=begin_ns,
                end_ns=time.monotonic_ns(),
                ending=ending,
                status=answer.status_code if answer is not None else 0,
                headers=tuple(sorted((name.lower(), value) for name, value in answer.headers.multi_items()))
                if answer is not None
                else (),
                body=answer.content.decode("latin-1") if answer is not None else "",
                lost=answer is not None and (loses or cuts),
                audit=self.auditing,
            )
        )
        if loses or cuts:
            return None
        return answer if answer is not None else httpx.Response(502)


async def _receive(reader: asyncio.StreamReader) -> tuple[h11.Request, bytes]:
    """Return a request with its body. Raises EOFError if the caller leaves before its end."""
    connection = h11.Connection(h11.SERVER)
    request: h11.Request | None = None
    body = bytearray()
    while True:
        match connection.next_event():
            case h11.NEED_DATA:
                connection.receive_data(await reader.read(65_536))
            case h11.Request() as request:
                pass
            case h11.Data(data=data):
                body += data
            case h11.EndOfMessage():
                assert request is not None
                return request, bytes(body)
            case _:
                raise EOFError


def _encoded(answer: httpx.Response) -> bytes:
    hop_by_hop = {"connection", "transfer-encoding", "content-length", "keep-alive"}
    headers = [(name, value) for name, value in answer.headers.multi_items() if name not in hop_by_hop]
    headers += [("content-length", str(len(answer.content))), ("connection", "close")]
    lines = [f"HTTP/1.1 {answer.status_code} {answer.reason_phrase}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + answer.content
