"""The reward service with Django and its middleware, in one file. The README describes its environment."""

import json
import os

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.urls import path

import dedup
import rewards
from dedup.django import IdempotencyMiddleware
from ledger import NAME, open_ledger
from serving import serve

ledger = open_ledger()
client = dedup.Client(os.environ.get("DEDUP_TARGET", "127.0.0.1:50051"), claimant=NAME)
ttl = float(os.environ["CLAIM_TTL"]) if "CLAIM_TTL" in os.environ else None
# With several users, also set `caller`: it keeps their keys and responses apart.
idempotency = IdempotencyMiddleware(client, ttl=ttl)


def handle(request: HttpRequest) -> HttpResponse:
    """Pay a reward, or list the rewards."""
    if request.method == "GET":
        return _sent(rewards.paid(ledger))
    if request.method != "POST":
        return HttpResponseNotAllowed(["GET", "POST"])
    try:
        order = json.loads(request.body)
    except ValueError:
        return _sent(rewards.problem(400, "the body is not JSON"))
    return _sent(rewards.pay(ledger, request.headers.get("Idempotency-Key", ""), order))


def _sent(response: rewards.Response) -> HttpResponse:
    return HttpResponse(response.body, status=response.status, headers=response.headers)


urlpatterns = [path("rewards", handle)]

if __name__ == "__main__":
    settings.configure(
        ALLOWED_HOSTS=["127.0.0.1", "localhost"],
        ROOT_URLCONF="__main__",
        MIDDLEWARE=["__main__.idempotency"],
    )
    with client:
        serve(get_wsgi_application(), int(os.environ.get("PORT", "0")))
    ledger.close()
