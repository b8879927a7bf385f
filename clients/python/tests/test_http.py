"""Idempotency-Key over HTTP: Starlette and Flask in front of the live service, and bare applications for the rest."""

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
from dedup.idempotency import Response as Kept
from dedup.idempotency import pack, unpack
from dedup.testing import AsyncFakeClient, FakeClient, FakeService

Post = Callable[..., Awaitable[httpx.Response]]
PROBLEM = "application/problem+json"


class Shop:
    """What the applications do: /pay counts its payments, and /fail, /raise, /large and /slow do as they say."""

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
    """A shop of this test's own."""
    return Shop()


def over_asgi(shop: Shop, client: aio.Client, **options: Any) -> Post:
    """Return how to post to the shop on Starlette."""
    app = asgi.IdempotencyMiddleware(starlette_app(shop), client, **options)

    async def post(path: str, body: bytes = b"", method: str = "POST", **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as http:
            return await http.request(method, path, content=body, headers=names(headers))

    return post


def over_wsgi(shop: Shop, client: Client, **options: Any) -> Post:
    """Return how to post to the shop on Flask."""
    app = wsgi.IdempotencyMiddleware(flask_app(shop), client, **options)

    async def post(path: str, body: bytes = b"", method: str = "POST", **headers: str) -> httpx.Response:
        def call() -> httpx.Response:
            with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://shop") as http:
                return http.request(method, path, content=body, headers=names(headers))

        return await asyncio.to_thread(call)

    return post


def names(headers: dict[str, str]) -> dict[str, str]:
    """Return headers by their names."""
    return {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.fixture(params=["asgi", "wsgi"])
async def post(request: pytest.FixtureRequest, target: str, shop: Shop) -> AsyncIterator[Post]:
    """Both middlewares in front of the live service."""
    async with aio.Client(target) as waiting:
        with Client(target) as blocking:
            yield over_asgi(shop, waiting) if request.param == "asgi" else over_wsgi(shop, blocking)


@pytest.fixture
def service() -> FakeService:
    """A service that the test may take away."""
    return FakeService()


@pytest.fixture(params=["asgi", "wsgi"])
def post_with(request: pytest.FixtureRequest, shop: Shop, service: FakeService) -> Callable[..., Post]:
    """Both middlewares with options, in front of the fake."""

    def make(on_unavailable: Any = "deny", **options: Any) -> Post:
        if request.param == "asgi":
            return over_asgi(shop, AsyncFakeClient(service, on_unavailable=on_unavailable), **options)
        return over_wsgi(shop, FakeClient(service, on_unavailable=on_unavailable), **options)

    return make


async def test_the_first_response_is_replayed(post: Post, shop: Shop, unique: str) -> None:
    """Status, content type and body, marked as replayed; the work is done once."""
    first = await post("/pay", b"5", idempotency_key=unique)
    again = await post("/pay", b"5", idempotency_key=f'"{unique}"')
    assert (first.status_code, first.json(), shop.payments) == (201, {"paid": 1}, [b"5"])
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers["content-type"] == first.headers["content-type"]
    assert (first.headers.get("idempotency-replayed"), again.headers["idempotency-replayed"]) == (None, "true")


async def test_another_body_under_the_key_is_told_so(post: Post, shop: Shop, unique: str) -> None:
    """422, and the work is not done."""
    await post("/pay", b"5", idempotency_key=unique)
    refused = await post("/pay", b"6", idempotency_key=unique)
    assert (refused.status_code, refused.headers["content-type"], refused.json()["status"]) == (422, PROBLEM, 422)
    assert shop.payments == [b"5"]


async def test_keys_of_other_routes_and_requests_without_a_key_are_apart(post: Post, shop: Shop, unique: str) -> None:
    """The same key at another path is another request; without one, and for GET, nothing is guarded."""
    assert (await post("/pay", idempotency_key=unique)).json() == {"paid": 1}
    assert (await post("/missing", idempotency_key=unique)).status_code == 404
    assert [(await post("/pay")).json() for _ in range(2)] == [{"paid": 3}, {"paid": 4}]
    assert [(await post("/pay", method="GET", idempotency_key=unique)).json() for _ in range(2)] == [
        {"paid": 5},
        {"paid": 6},
    ]
    assert len(shop.payments) == 6


async def test_a_refusal_of_the_application_is_replayed_too(post: Post, shop: Shop, unique: str) -> None:
    """A 4xx is an answer."""
    for _ in range(2):
        assert (await post("/missing", idempotency_key=unique)).status_code == 404
    assert len(shop.payments) == 1


async def test_a_server_error_may_be_tried_again(post: Post, shop: Shop, unique: str) -> None:
    """A 5xx releases."""
    assert (await post("/fail", idempotency_key=unique)).status_code == 500
    shop.failing = False
    assert (await post("/fail", idempotency_key=unique)).json() == {"paid": 2}
    assert (await post("/fail", idempotency_key=unique)).json() == {"paid": 2}


async def test_an_exception_may_be_tried_again(post: Post, shop: Shop, unique: str) -> None:
    """It releases, and goes on to the server."""
    with pytest.raises(ZeroDivisionError):
        await post("/raise", idempotency_key=unique)
    shop.failing = False
    assert (await post("/raise", idempotency_key=unique)).json() == {"paid": 2}


async def test_a_response_too_large_is_delivered_and_not_replayed(post: Post, shop: Shop, unique: str) -> None:
    """The work is done, so a duplicate is told 409 and why."""
    assert (await post("/large", idempotency_key=unique)).content == b"x" * 5_000
    again = await post("/large", idempotency_key=unique)
    assert (again.status_code, again.headers["content-type"]) == (409, PROBLEM)
    assert "too large" in again.json()["detail"]
    assert len(shop.payments) == 1


async def test_a_request_in_progress_is_a_conflict(target: str, shop: Shop, unique: str) -> None:
    """409 until it ends, and then its response."""
    async with aio.Client(target) as client:
        post = over_asgi(shop, client)
        first = asyncio.ensure_future(post("/slow", idempotency_key=unique))
        await shop.entered.wait()
        meanwhile = await post("/slow", idempotency_key=unique)
        assert (meanwhile.status_code, meanwhile.headers["content-type"]) == (409, PROBLEM)
        assert "in progress" in meanwhile.json()["detail"]
        shop.leave.set()
        assert (await first).json() == (await post("/slow", idempotency_key=unique)).json() == {"paid": 1}


async def test_of_many_at_once_one_is_handled(post: Post, shop: Shop, unique: str) -> None:
    """The others are told 409 or get its response."""
    answers = await asyncio.gather(*[post("/pay", idempotency_key=unique) for _ in range(20)])
    assert len(shop.payments) == 1
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert sum(answer.status_code == 201 and "idempotency-replayed" not in answer.headers for answer in answers) == 1


async def test_without_the_service_it_is_503_never_409(
    post_with: Callable[..., Post], shop: Shop, service: FakeService
) -> None:
    """The caller may try again; nothing is done meanwhile, unless that was chosen."""
    service.unavailable = True
    denied = await post_with()("/pay", idempotency_key="k")
    assert (denied.status_code, denied.headers["retry-after"], denied.headers["content-type"]) == (503, "1", PROBLEM)
    assert not shop.payments
    assert (await post_with("allow")("/pay", idempotency_key="k")).status_code == 201


async def test_work_that_is_done_is_answered_though_its_end_cannot_be_told(
    post_with: Callable[..., Post], shop: Shop, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    """The response is delivered, and a warning logged."""
    work = shop.handle

    def handle(path: str, body: bytes) -> tuple[int, bytes]:
        service.unavailable = True
        return work(path, body)

    shop.handle = handle  # type: ignore[method-assign]
    assert (await post_with()("/pay", idempotency_key="k")).status_code == 201
    assert "could not end the claim" in caplog.text


async def test_a_key_may_be_required_and_must_be_one(post_with: Callable[..., Post], shop: Shop) -> None:
    """400 without it, for an empty one, and for one that is too long."""
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


async def test_callers_are_told_apart_where_the_application_can(post_with: Callable[..., Post], shop: Shop) -> None:
    """The same key of two users is two requests."""
    post = post_with(caller=lambda headers: headers["x-user"])
    for user in ("anna", "ben", "anna"):
        await post("/pay", idempotency_key="k", x_user=user)
    assert len(shop.payments) == 2


async def test_a_body_has_a_limit(post_with: Callable[..., Post], shop: Shop) -> None:
    """413 for a larger one; the fingerprint needs it whole."""
    post = post_with(max_body_bytes=10)
    assert (await post("/pay", b"x" * 11, idempotency_key="k")).status_code == 413
    assert (await post("/pay", b"x" * 10, idempotency_key="k")).status_code == 201
    assert shop.payments == [b"x" * 10]


async def test_a_wrong_set_up_is_not_answered_as_a_duplicate(post_with: Callable[..., Post]) -> None:
    """It is an error of the application."""
    with pytest.raises(InvalidRequest):
        await post_with(ttl=-1)("/pay", idempotency_key="k")


async def test_retention_is_how_long_a_response_is_replayed(
    post_with: Callable[..., Post], shop: Shop, service: FakeService
) -> None:
    """After it the request is handled again."""
    post = post_with(ttl=5, retention=100)
    for seconds in (0, 90, 20):
        service.advance(seconds)
        await post("/pay", idempotency_key="k")
    assert len(shop.payments) == 2


async def test_what_others_completed_is_a_conflict(post_with: Callable[..., Post], service: FakeService) -> None:
    """A result that is no response of this middleware is not sent to anybody."""
    with FakeClient(service).claim(":POST:/pay:k") as claim:
        claim.result = b"something else"
    assert (await post_with()("/pay", idempotency_key="k")).status_code == 409


@pytest.mark.parametrize(("size", "fits"), [(4_081, True), (4_082, False)])
def test_a_kept_response_has_at_most_4096_bytes(size: int, fits: bool) -> None:  # noqa: FBT001 - A parameter of pytest.
    """Status, content type and body together."""
    packed = pack(Kept(200, (("content-type", "text/plain"),), b"x" * size))
    assert len(packed) <= 4_096
    kept = unpack(packed)
    assert (kept is not None) is fits
    assert kept is None or kept.body == b"x" * size


async def test_asgi_goes_on_without_a_caller() -> None:
    """Who left before the body was there is neither claimed for nor answered; other protocols go through."""
    service, seen = FakeService(), []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope["type"])

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def nobody(_message: Any) -> None:
        raise AssertionError("there is nobody to answer")

    guarded = asgi.IdempotencyMiddleware(app, AsyncFakeClient(service))
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"idempotency-key", b"k")]}
    await guarded(scope, gone, nobody)
    await guarded({"type": "lifespan"}, gone, nobody)
    assert (seen, service.calls) == (["lifespan"], [])


def test_wsgi_hands_on_what_is_written() -> None:
    """The old way to give a body, and `close` of the result, work as without the middleware."""
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
