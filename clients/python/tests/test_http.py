"""Idempotency-Key over HTTP: Starlette and Flask with the live service, and plain applications for the rest."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import flask
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dedup import Client, InvalidRequest, aio, asgi, wsgi
from dedup.idempotency import Response as StoredResponse
from dedup.idempotency import pack, unpack
from dedup.testing import AsyncFakeClient, FakeClient, FakeService

Post = Callable[..., Awaitable[httpx.Response]]
PROBLEM = "application/problem+json"


class Shop:
    """The application: /pay counts payments; /fail, /raise, /large and /slow do what their names say."""

    def __init__(self) -> None:
        self.payments: list[bytes] = []
        self.failing = True
        self.entered = asyncio.Event()
        self.leave = asyncio.Event()

    def handle(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body."""
        self.payments.append(body)
        if path == "/raise" and self.failing:
            raise ZeroDivisionError
        status = 500 if path == "/fail" and self.failing else 404 if path == "/missing" else 201
        return status, b"x" * 5_000 if path == "/large" else b'{"paid": %d}' % len(self.payments)


def starlette_app(shop: Shop) -> Starlette:
    """The shop on Starlette."""

    async def handle(request: Request) -> Response:
        status, body = shop.handle(request.url.path, await request.body())
        if request.url.path == "/slow":
            shop.entered.set()
            await shop.leave.wait()
        if request.url.path == "/large":
            return StreamingResponse((body[at : at + 500] for at in range(0, len(body), 500)), status)
        return Response(body, status, media_type="application/json")

    return Starlette(routes=[Route("/{path}", handle, methods=["GET", "POST"])])


def flask_app(shop: Shop) -> flask.Flask:
    """The shop on Flask."""
    app = flask.Flask("shop")
    app.config["PROPAGATE_EXCEPTIONS"] = True

    @app.route("/<path>", methods=["GET", "POST"])
    def handle(path: str) -> flask.Response:
        status, body = shop.handle(f"/{path}", flask.request.get_data())
        return flask.Response(body, status, mimetype="application/json")

    return app


@pytest.fixture
def shop() -> Shop:
    """A new shop for each test."""
    return Shop()


def over_asgi(shop: Shop, client: aio.Client, **options: Any) -> Post:
    """Return a function that posts to the shop on Starlette."""
    app = asgi.IdempotencyMiddleware(starlette_app(shop), client, **options)

    async def post(path: str, body: bytes = b"", method: str = "POST", **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as http:
            return await http.request(method, path, content=body, headers=names(headers))

    return post


def over_wsgi(shop: Shop, client: Client, **options: Any) -> Post:
    """Return a function that posts to the shop on Flask."""
    app = wsgi.IdempotencyMiddleware(flask_app(shop), client, **options)

    async def post(path: str, body: bytes = b"", method: str = "POST", **headers: str) -> httpx.Response:
        def call() -> httpx.Response:
            with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://shop") as http:
                return http.request(method, path, content=body, headers=names(headers))

        return await asyncio.to_thread(call)

    return post


def names(headers: dict[str, str]) -> dict[str, str]:
    """Return headers with their HTTP names."""
    return {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.fixture(params=["asgi", "wsgi"])
async def post(request: pytest.FixtureRequest, target: str, shop: Shop) -> AsyncIterator[Post]:
    """Both middlewares with the live service."""
    async with aio.Client(target) as waiting:
        with Client(target) as blocking:
            yield over_asgi(shop, waiting) if request.param == "asgi" else over_wsgi(shop, blocking)


@pytest.fixture
def service() -> FakeService:
    """A fake service that the test can make unavailable."""
    return FakeService()


@pytest.fixture(params=["asgi", "wsgi"])
def post_with(request: pytest.FixtureRequest, shop: Shop, service: FakeService) -> Callable[..., Post]:
    """Both middlewares with options, with the fake service."""

    def make(on_unavailable: Any = "deny", **options: Any) -> Post:
        if request.param == "asgi":
            return over_asgi(shop, AsyncFakeClient(service, on_unavailable=on_unavailable), **options)
        return over_wsgi(shop, FakeClient(service, on_unavailable=on_unavailable), **options)

    return make


async def test_the_first_response_is_replayed(post: Post, shop: Shop, unique: str) -> None:
    """Status, content type and body, marked as replayed. The work is done once."""
    first = await post("/pay", b"5", idempotency_key=unique)
    again = await post("/pay", b"5", idempotency_key=f'"{unique}"')
    assert (first.status_code, first.json(), shop.payments) == (201, {"paid": 1}, [b"5"])
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers["content-type"] == first.headers["content-type"]
    assert (first.headers.get("idempotency-replayed"), again.headers["idempotency-replayed"]) == (None, "true")


async def test_another_body_under_the_key_is_refused(post: Post, shop: Shop, unique: str) -> None:
    """It gets 422, and the work is not done."""
    await post("/pay", b"5", idempotency_key=unique)
    refused = await post("/pay", b"6", idempotency_key=unique)
    assert (refused.status_code, refused.headers["content-type"], refused.json()["status"]) == (422, PROBLEM, 422)
    assert shop.payments == [b"5"]


async def test_keys_are_independent_for_each_route(post: Post, shop: Shop, unique: str) -> None:
    """The same key at another path is another request. GET and requests without a key are not guarded."""
    assert (await post("/pay", idempotency_key=unique)).json() == {"paid": 1}
    assert (await post("/missing", idempotency_key=unique)).status_code == 404
    assert [(await post("/pay")).json() for _ in range(2)] == [{"paid": 3}, {"paid": 4}]
    assert [(await post("/pay", method="GET", idempotency_key=unique)).json() for _ in range(2)] == [
        {"paid": 5},
        {"paid": 6},
    ]
    assert len(shop.payments) == 6


async def test_a_client_error_is_replayed(post: Post, shop: Shop, unique: str) -> None:
    """A 4xx of the application completes the request."""
    for _ in range(2):
        assert (await post("/missing", idempotency_key=unique)).status_code == 404
    assert len(shop.payments) == 1


async def test_a_server_error_releases_the_key(post: Post, shop: Shop, unique: str) -> None:
    """After a 5xx the request may be repeated."""
    assert (await post("/fail", idempotency_key=unique)).status_code == 500
    shop.failing = False
    assert (await post("/fail", idempotency_key=unique)).json() == {"paid": 2}
    assert (await post("/fail", idempotency_key=unique)).json() == {"paid": 2}


async def test_an_exception_releases_the_key(post: Post, shop: Shop, unique: str) -> None:
    """The exception propagates to the server, and the request may be repeated."""
    with pytest.raises(ZeroDivisionError):
        await post("/raise", idempotency_key=unique)
    shop.failing = False
    assert (await post("/raise", idempotency_key=unique)).json() == {"paid": 2}


async def test_a_large_response_is_delivered_and_not_replayed(post: Post, shop: Shop, unique: str) -> None:
    """The work is done, so a duplicate gets 409 with the cause."""
    assert (await post("/large", idempotency_key=unique)).content == b"x" * 5_000
    again = await post("/large", idempotency_key=unique)
    assert (again.status_code, again.headers["content-type"]) == (409, PROBLEM)
    assert "too large" in again.json()["detail"]
    assert len(shop.payments) == 1


async def test_a_request_in_progress_is_a_conflict(target: str, shop: Shop, unique: str) -> None:
    """It gets 409 until the work ends, then its response."""
    async with aio.Client(target) as client:
        post = over_asgi(shop, client)
        first = asyncio.ensure_future(post("/slow", idempotency_key=unique))
        await shop.entered.wait()
        meanwhile = await post("/slow", idempotency_key=unique)
        assert (meanwhile.status_code, meanwhile.headers["content-type"]) == (409, PROBLEM)
        assert "in progress" in meanwhile.json()["detail"]
        shop.leave.set()
        assert (await first).json() == (await post("/slow", idempotency_key=unique)).json() == {"paid": 1}


async def test_of_concurrent_requests_one_is_handled(post: Post, shop: Shop, unique: str) -> None:
    """The others get 409 or the first response."""
    answers = await asyncio.gather(*[post("/pay", idempotency_key=unique) for _ in range(20)])
    assert len(shop.payments) == 1
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert sum(answer.status_code == 201 and "idempotency-replayed" not in answer.headers for answer in answers) == 1


async def test_an_outage_is_503_never_409(post_with: Callable[..., Post], shop: Shop, service: FakeService) -> None:
    """The caller may retry. The work is not done, unless `on_unavailable` allows it."""
    service.unavailable = True
    denied = await post_with()("/pay", idempotency_key="k")
    assert (denied.status_code, denied.headers["retry-after"], denied.headers["content-type"]) == (503, "1", PROBLEM)
    assert not shop.payments
    assert (await post_with("allow")("/pay", idempotency_key="k")).status_code == 201


async def test_a_response_is_delivered_if_completing_fails(
    post_with: Callable[..., Post], shop: Shop, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    """The work is done, and a warning is logged."""
    work = shop.handle

    def handle(path: str, body: bytes) -> tuple[int, bytes]:
        service.unavailable = True
        return work(path, body)

    shop.handle = handle  # type: ignore[method-assign]
    assert (await post_with()("/pay", idempotency_key="k")).status_code == 201
    assert "could not end the claim" in caplog.text


async def test_a_key_may_be_required_and_must_be_valid(post_with: Callable[..., Post], shop: Shop) -> None:
    """A missing, empty or too long key gets 400."""
    post = post_with(required=True)
    answers = [
        await post("/pay"),
        await post("/pay", idempotency_key='""'),
        await post("/pay", idempotency_key="x" * 600),
    ]
    assert [answer.status_code for answer in answers] == [400] * 3
    assert "512 bytes" in answers[2].json()["detail"]
    assert (await post("/pay", method="GET")).status_code == 201
    assert len(shop.payments) == 1


async def test_keys_are_independent_for_each_caller(post_with: Callable[..., Post], shop: Shop) -> None:
    """The same key from two users is two requests."""
    post = post_with(caller=lambda headers: headers["x-user"])
    for user in ("anna", "ben", "anna"):
        await post("/pay", idempotency_key="k", x_user=user)
    assert len(shop.payments) == 2


async def test_a_body_has_a_limit(post_with: Callable[..., Post], shop: Shop) -> None:
    """A larger body gets 413: the fingerprint needs the whole body."""
    post = post_with(max_body_bytes=10)
    assert (await post("/pay", b"x" * 11, idempotency_key="k")).status_code == 413
    assert (await post("/pay", b"x" * 10, idempotency_key="k")).status_code == 201
    assert shop.payments == [b"x" * 10]


async def test_a_misconfigured_middleware_raises(post_with: Callable[..., Post]) -> None:
    """It is a bug of the application, not an answer to the caller."""
    with pytest.raises(InvalidRequest):
        await post_with(ttl=-1)("/pay", idempotency_key="k")


async def test_retention_is_how_long_a_response_is_replayed(
    post_with: Callable[..., Post], shop: Shop, service: FakeService
) -> None:
    """Afterwards the request is handled again."""
    post = post_with(ttl=5, retention=100)
    for seconds in (0, 90, 20):
        service.advance(seconds)
        await post("/pay", idempotency_key="k")
    assert len(shop.payments) == 2


async def test_a_foreign_result_is_a_conflict(post_with: Callable[..., Post], service: FakeService) -> None:
    """A result that this middleware did not store is never sent as a response."""
    with FakeClient(service).claim(":POST:/pay:k") as claim:
        claim.result = b"something else"
    assert (await post_with()("/pay", idempotency_key="k")).status_code == 409


@pytest.mark.parametrize(("size", "fits"), [(4_081, True), (4_082, False)])
def test_a_stored_response_has_at_most_4096_bytes(size: int, fits: bool) -> None:  # noqa: FBT001 - A pytest parameter.
    """Status, content type and body together."""
    packed = pack(StoredResponse(200, (("content-type", "text/plain"),), b"x" * size))
    assert len(packed) <= 4_096
    stored = unpack(packed)
    assert (stored is not None) is fits
    assert stored is None or stored.body == b"x" * size


async def test_asgi_ignores_disconnected_callers() -> None:
    """A caller that disconnects before its body arrives causes no claim and no answer. Other protocols pass."""
    service, seen = FakeService(), []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope["type"])

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def unexpected(_message: Any) -> None:
        raise AssertionError("the caller has disconnected")

    guarded = asgi.IdempotencyMiddleware(app, AsyncFakeClient(service))
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"idempotency-key", b"k")]}
    await guarded(scope, gone, unexpected)
    await guarded({"type": "lifespan"}, gone, unexpected)
    assert (seen, service.calls) == (["lifespan"], [])


def test_wsgi_passes_on_written_data() -> None:
    """The `write` callable and `close` of the result work as they do without the middleware."""
    closed = []

    class Result(list[bytes]):
        def close(self) -> None:
            closed.append(True)

    def app(_environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])(b"written ")
        return Result([b"returned"])

    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/", "HTTP_IDEMPOTENCY_KEY": "k"}
    started: list[Any] = []
    guarded = wsgi.IdempotencyMiddleware(app, FakeClient())
    bodies = [b"".join(guarded(dict(environ), lambda *parts: started.append(parts))) for _ in range(2)]  # type: ignore[arg-type]
    assert bodies == [b"written returned"] * 2
    assert closed == [True]
    assert started[1][1] == [("content-type", "text/plain"), ("idempotency-replayed", "true"), ("content-length", "16")]
