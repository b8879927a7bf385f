"""ASGI, WSGI and Django processes behind one route: each key is handled once, and replayed by all."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

APPLICATIONS = {
    "asgi": """
import asyncio, uvicorn
from dedup import aio
from dedup.asgi import IdempotencyMiddleware

async def app(scope, receive, send):
    while (await receive()).get("more_body"): pass
    headers = [(b"content-type", b"application/json"), (b"location", b"/rewards/17"), (b"content-length", b"1")]
    await send({"type": "http.response.start", "status": 201, "headers": headers})
    await send({"type": "http.response.body", "body": pay()})

async def serve():
    server = uvicorn.Server(uvicorn.Config(IdempotencyMiddleware(app, aio.Client(target)), port=0, lifespan="off"))
    serving = asyncio.ensure_future(server.serve())
    while not server.started: await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving

asyncio.run(serve())
""",
    "wsgi": """
from wsgiref.simple_server import make_server
import dedup
from dedup.wsgi import IdempotencyMiddleware

def app(environ, start_response):
    start_response("201 Created", [("Content-Type", "application/json"), ("Location", "/rewards/17")])
    return [pay()]

server = make_server("127.0.0.1", 0, IdempotencyMiddleware(app, dedup.Client(target)))
print(server.server_port, flush=True)
server.serve_forever()
""",
    "django": """
from wsgiref.simple_server import make_server
import django
from django.conf import settings
from django.http import HttpResponse
from django.urls import re_path
import dedup
from dedup.django import IdempotencyMiddleware

def view(request):
    return HttpResponse(pay(), status=201, content_type="application/json", headers={"Location": "/rewards/17"})

urlpatterns = [re_path("", view)]
idempotency = IdempotencyMiddleware(dedup.Client(target))
settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF="__main__", MIDDLEWARE=["__main__.idempotency"])
django.setup()
from django.core.handlers.wsgi import WSGIHandler
server = make_server("127.0.0.1", 0, WSGIHandler())
print(server.server_port, flush=True)
server.serve_forever()
""",
}
PAY = """
import sys
target, path = sys.argv[1:]

def pay():
    with open(path, "a") as payments: payments.write("paid\\n")
    return b"5"
"""


@pytest.fixture(scope="module")
def payments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a line for each payment."""
    path = tmp_path_factory.mktemp("fleet") / "payments"
    path.touch()
    return path


@pytest.fixture(scope="module")
def fleet(redis_target: str, payments: Path) -> Iterator[dict[str, str]]:
    """The addresses of the processes."""
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", PAY + program, redis_target, str(payments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, program in APPLICATIONS.items()
    }
    addresses = {}
    for name, process in started.items():
        assert process.stdout is not None
        addresses[name] = f"http://127.0.0.1:{int(process.stdout.readline())}"
    yield addresses
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("first", APPLICATIONS)
def test_a_request_is_handled_once_by_the_fleet(fleet: dict[str, str], payments: Path, unique: str, first: str) -> None:
    """Whichever process handles it, the others replay its response."""
    before = payments.read_text().count("paid")
    order = [first, *(name for name in APPLICATIONS if name != first)]
    answers = [
        httpx.post(
            f"{fleet[name]}/p%C3%A9/a%2Fb%20c?a=%20&b", content=b"{}", headers={"Idempotency-Key": unique}, timeout=60
        )
        for name in order
    ]
    assert payments.read_text().count("paid") == before + 1
    for answer in answers:
        assert (answer.status_code, answer.content) == (201, b"5")
        assert (answer.headers["content-type"], answer.headers["location"]) == ("application/json", "/rewards/17")
    assert ["idempotency-replayed" in answer.headers for answer in answers] == [False, True, True]
