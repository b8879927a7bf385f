"""The reward service with Flask and the WSGI middleware. The README describes its environment."""

import os

import flask

import dedup
import rewards
from dedup.wsgi import IdempotencyMiddleware
from ledger import NAME, open_ledger
from serving import serve

ledger = open_ledger()
client = dedup.Client(os.environ.get("DEDUP_TARGET", "127.0.0.1:50051"), claimant=NAME)
ttl = float(os.environ["CLAIM_TTL"]) if "CLAIM_TTL" in os.environ else None

app = flask.Flask("rewards")
# With several users, also set `caller`: it keeps their keys and responses apart.
app.wsgi_app = IdempotencyMiddleware(app.wsgi_app, client, ttl=ttl)  # type: ignore[method-assign]


@app.post("/rewards")
def pay() -> flask.Response:
    """Pay a reward."""
    order = flask.request.get_json()
    return _sent(rewards.pay(ledger, flask.request.headers.get("Idempotency-Key", ""), order))


@app.get("/rewards")
def paid() -> flask.Response:
    """List the rewards."""
    return _sent(rewards.paid(ledger))


def _sent(response: rewards.Response) -> flask.Response:
    return flask.Response(response.body, response.status, response.headers)


if __name__ == "__main__":
    with client:
        serve(app, int(os.environ.get("PORT", "0")))
    ledger.close()
