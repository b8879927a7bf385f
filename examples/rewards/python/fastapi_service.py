"""The reward service with FastAPI and the ASGI middleware. The README describes its environment."""

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, Header, Response

import dedup.aio
import rewards
from dedup.asgi import IdempotencyMiddleware
from ledger import NAME, open_ledger

ledger = open_ledger()
client = dedup.aio.Client(os.environ.get("DEDUP_TARGET", "127.0.0.1:50051"), claimant=NAME)
ttl = float(os.environ["CLAIM_TTL"]) if "CLAIM_TTL" in os.environ else None


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Close the client after the last request."""
    async with client:
        yield
    ledger.close()


app = FastAPI(lifespan=lifespan)
# With several users, also set `caller`: it keeps their keys and responses apart.
app.add_middleware(IdempotencyMiddleware, client=client, ttl=ttl)


@app.post("/rewards")
def pay(order: Annotated[dict[str, Any], Body()], idempotency_key: Annotated[str, Header()] = "") -> Response:
    """Pay a reward."""
    return _sent(rewards.pay(ledger, idempotency_key, order))


@app.get("/rewards")
def paid() -> Response:
    """List the rewards."""
    return _sent(rewards.paid(ledger))


def _sent(response: rewards.Response) -> Response:
    return Response(response.body, response.status, response.headers)


if __name__ == "__main__":
    # uvicorn finishes the requests in progress after SIGTERM, and then raises the signal again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listener = socket.create_server(("127.0.0.1", int(os.environ.get("PORT", "0"))))
    print(f"listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
