"""The lucky box API in Python: pays one reward per click, if its guard works.

`python lucky_box.py --guard legacy|sidecar --redis PORT --sidecar TARGET` listens on a free port and logs the port.
"""

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import redis.asyncio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

import dedup
import dedup.aio

CORRELATION_HEADER = "x-correlation-id"
# Latency of the reward service.
WORK_S = 0.02


class MultipleClick(Exception):
    """Another click came first."""


class Guard(Protocol):
    """Lets one of several clicks pass."""

    def admit(self, transaction_id: str) -> AbstractAsyncContextManager[None]:
        """Hold the transaction during the block. Raises MultipleClick if another click holds it."""


class LegacyGuard:
    """Reads a flag and then writes it; other clicks can read it in between."""

    def __init__(self, port: int) -> None:
        self._redis = redis.asyncio.Redis(port=port)

    @asynccontextmanager
    async def admit(self, transaction_id: str) -> AsyncIterator[None]:
        """See Guard.admit."""
        if await self._redis.get(transaction_id):
            raise MultipleClick
        await self._redis.set(transaction_id, b"\xc3", ex=60)
        yield


class SidecarGuard:
    """Claims the transaction at the dedup service with one atomic command."""

    def __init__(self, target: str) -> None:
        self._client = dedup.aio.Client(target)

    @asynccontextmanager
    async def admit(self, transaction_id: str) -> AsyncIterator[None]:
        """See Guard.admit. Leaving the block completes the claim; a Conflict, which paid nothing, releases it."""
        try:
            claim = await self._client.claim(
                transaction_id, ttl=60, claimant="lucky-box-python", keep_alive=True, release_on=(Conflict,)
            )
        except dedup.DuplicateTransaction:
            raise MultipleClick from None
        async with claim:
            yield


class Conflict(Exception):
    """Another payout of the box started meanwhile."""


class Promotions:
    """Pays rewards. As in the original, a payout fails if a later one has started."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}

    async def pay(self, transaction_id: str) -> int:
        """Return the reward. Raises Conflict."""
        mine = self._begun[transaction_id] = self._begun.get(transaction_id, 0) + 1
        await asyncio.sleep(WORK_S)
        if self._begun[transaction_id] != mine:
            raise Conflict
        return 5


class Click(BaseModel):
    """The request body."""

    device: int
    event: str
    day: str


def make_app(guard: Guard) -> FastAPI:
    """Return the API with this guard."""
    app, promotions = FastAPI(), Promotions()

    @app.post("/api/benefit-promotions/{unit}/lucky-box")
    async def open_box(unit: int, click: Click, request: Request) -> JSONResponse:
        started, begun = time.time(), time.perf_counter()
        correlation_id = request.headers.get(CORRELATION_HEADER) or secrets.token_hex(16)
        passed = False
        body: dict[str, int | str]
        try:
            transaction_id = dedup.transaction_id("lucky_box", str(click.device), str(unit), click.event, click.day)
            with dedup.call_metadata((CORRELATION_HEADER, correlation_id)):
                async with guard.admit(transaction_id):
                    passed = True
                    status, body = 200, {"reward": await promotions.pay(transaction_id)}
        except MultipleClick:
            status, body = 409, {"error": "multiple_click"}
        except Conflict:
            status, body = 409, {"error": "conflict"}
        except dedup.Unavailable:
            # Perhaps a duplicate: pay nothing and do not answer 409.
            status, body = 503, {"error": "guard_unavailable"}
        log(
            "click",
            correlation_id=correlation_id,
            started=started,
            passed=passed,
            status=status,
            latency_ms=round((time.perf_counter() - begun) * 1000, 3),
            **body,
        )
        return JSONResponse(body, status, headers={CORRELATION_HEADER: correlation_id})

    return app


def log(event: str, **fields: Any) -> None:
    """Write one JSON line."""
    sys.stderr.write(json.dumps({"event": event, **fields}) + "\n")


async def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guard", choices=("legacy", "sidecar"), required=True)
    parser.add_argument("--redis", type=int, required=True, help="port of the Redis for the legacy guard")
    parser.add_argument("--sidecar", required=True, help="target of the dedup service")
    options = parser.parse_args()
    guard: Guard = LegacyGuard(options.redis) if options.guard == "legacy" else SidecarGuard(options.sidecar)
    server = uvicorn.Server(
        uvicorn.Config(make_app(guard), host="127.0.0.1", port=0, log_level="error", lifespan="off")
    )
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    log("serving", port=server.servers[0].sockets[0].getsockname()[1])
    await serving


if __name__ == "__main__":
    asyncio.run(main())
