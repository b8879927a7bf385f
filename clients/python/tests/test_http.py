"""Idempotency-Key over HTTP: Starlette, Flask and Django with the live service, and plain applications for the rest."""

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import django
import flask
import httpx
import pytest
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler, WSGIRequest
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import re_path
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from dedup import Client, InvalidRequest, aio, asgi, idempotency, wsgi
from dedup.django import IdempotencyMiddleware as DjangoMiddleware
from dedup.http_profile import outcome_of
from dedup.idempotency import current_claim
from dedup.testing import AsyncFakeClient, FakeClient, FakeService

Post = Callable[..., Awaitable[httpx.Response]]
Headers = list[tuple[str, str]]
PROBLEM = "application/problem+json"
VECTORS = json.loads((Path(__file__).parents[2] / "golden" / "http.json").read_text())
STATUSES = VECTORS["statuses"]
KINDS = ["asgi", "wsgi", "django", "django-asgi"]
# ASGI and WSGI have no flush.
STREAMED = [
    pytest.param(kind, case, id=f"{kind} {case['name']}")
    for kind in KINDS
    for case in VECTORS["streamed"]
    if not case["flushed"] or "django" in kind
]

if not settings.configured:
    settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF="", LOGGING_CONFIG=None, USE_TZ=True)
    django.setup()


class Shop:
    """The application: every request counts a payment, and its path says how it ends."""

    def __init__(self) -> None:
        self.payments: list[bytes] = []
        self.claims: list[Any] = []
        self.failing = True
        self.entered = threading.Event()
        self.leave = threading.Event()
        self.extra: Headers = []
        self.parts: list[bytes] = []
        self.flushes = False
        self.content_type = "application/json"

    def handle(self, path: str, body: bytes) -> tuple[int, Headers, bytes]:
        """Return status, headers and body."""
        self.payments.append(body)
        self.claims.append(current_claim())
        if path == "/raise" and self.failing:
            raise ZeroDivisionError
        if path == "/slow":
            self.entered.set()
            assert self.leave.wait(60)
        status = int(path.removeprefix("/status/")) if path.startswith("/status/") and self.failing else 201
        headers = [("X-Reward", "5"), ("Set-Cookie", "session=1"), *self.extra]
        if path.startswith("/located"):
            headers.append(("Location", "/rewards/17"))
        return status, headers, b"x" * 5_000 if "large" in path else b'{"paid": %d}' % len(self.payments)


def starlette_app(shop: Shop) -> Starlette:
    """The shop on Starlette."""

    async def handle(request: Request) -> Response:
        body = await request.body()
        # In a thread, as an endpoint that is not a coroutine function.
        status, headers, content = await asyncio.to_thread(shop.handle, request.url.path, body)
        response: Response
        if shop.parts:
            response = StreamingResponse(iter(shop.parts), status, media_type=shop.content_type)
        elif request.url.path.endswith("stream"):
            response = StreamingResponse((content[at : at + 500] for at in range(0, len(content), 500)), status)
        else:
            response = Response(content, status, media_type="application/json")
        for name, value in headers:
            response.headers.append(name, value)
        return response

    return Starlette(routes=[Route("/{path:path}", handle, methods=["GET", "POST"])])


def flask_app(shop: Shop) -> flask.Flask:
    """The shop on Flask."""
    app = flask.Flask("shop")
    app.config["PROPAGATE_EXCEPTIONS"] = True

    @app.route("/<path:path>", methods=["GET", "POST"])
    def handle(path: str) -> flask.Response:
        status, headers, content = shop.handle(f"/{path}", flask.request.get_data())
        body = iter(shop.parts or [content]) if shop.parts or path.endswith("stream") else content
        response = flask.Response(body, status, content_type=shop.content_type)
        for name, value in headers:
            response.headers.add(name, value)
        return response

    return app


def django_app(shop: Shop, middleware: DjangoMiddleware, handler: Callable[[], Any]) -> Any:
    """The shop on Django."""

    def handle(request: HttpRequest) -> Any:
        status, headers, content = shop.handle(request.path, request.body)
        make = StreamingHttpResponse if shop.flushes or request.path.endswith("stream") else HttpResponse
        response = make(iter(shop.parts or [content]), status=status, content_type=shop.content_type)
        for name, value in headers:
            response[name] = value
        return response

    class Handler(handler):  # type: ignore[misc,valid-type]
        """Serves the URLs of this shop."""

        def get_response(self, request: HttpRequest) -> Any:
            request.urlconf = urls
            return super().get_response(request)

        async def get_response_async(self, request: HttpRequest) -> Any:
            request.urlconf = urls
            return await super().get_response_async(request)

    class Urls:
        urlpatterns = (re_path("", handle),)

    urls = Urls()
    global guard  # noqa: PLW0603 - Django imports its middleware by name.
    guard = middleware
    settings.MIDDLEWARE = [f"{__name__}.guard"]
    settings.DEBUG_PROPAGATE_EXCEPTIONS = True
    settings.ROOT_URLCONF = urls
    return Handler()


guard: DjangoMiddleware


def over_asgi(app: Any) -> Post:
    """Return a function that posts to an ASGI application."""

    async def post(path: str, body: bytes = b"", method: str = "POST", **headers: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as http:
            return await http.request(method, path, content=body, headers=names(headers))

    return post


def over_wsgi(app: Any) -> Post:
    """Return a function that posts to a WSGI application."""

    async def post(path: str, body: bytes = b"", method: str = "POST", **headers: str) -> httpx.Response:
        def call() -> httpx.Response:
            with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://shop") as http:
                return http.request(method, path, content=body, headers=names(headers))

        return await asyncio.to_thread(call)

    return post


def names(headers: dict[str, str]) -> dict[str, str]:
    """Return headers with their HTTP names."""
    return {name.replace("_", "-"): value for name, value in headers.items()}


def guarded(kind: str, shop: Shop, blocking: Client, waiting: aio.Client, **options: Any) -> Post:
    """Return a function that posts to the shop behind one of the middlewares."""
    match kind:
        case "asgi":
            return over_asgi(asgi.IdempotencyMiddleware(starlette_app(shop), waiting, **options))
        case "wsgi":
            return over_wsgi(wsgi.IdempotencyMiddleware(flask_app(shop), blocking, **options))
        case "django":
            return over_wsgi(django_app(shop, DjangoMiddleware(blocking, **options), WSGIHandler))
    return over_asgi(django_app(shop, DjangoMiddleware(waiting, **options), ASGIHandler))


@pytest.fixture
def shop() -> Iterator[Shop]:
    """A new shop for each test."""
    shop = Shop()
    yield shop
    shop.leave.set()


@pytest.fixture(params=KINDS)
async def live(request: pytest.FixtureRequest, target: str, shop: Shop) -> AsyncIterator[Callable[..., Post]]:
    """Each middleware, with options, with the live service."""
    async with aio.Client(target) as waiting:
        with Client(target) as blocking:
            yield lambda **options: guarded(request.param, shop, blocking, waiting, **options)


@pytest.fixture
def post(live: Callable[..., Post]) -> Post:
    """Each middleware with the live service."""
    return live()


@pytest.fixture
def service() -> FakeService:
    """A fake service that the test can make unavailable."""
    return FakeService()


@pytest.fixture(params=KINDS)
def post_with(request: pytest.FixtureRequest, shop: Shop, service: FakeService) -> Callable[..., Post]:
    """Each middleware with options, with the fake service."""

    def make(on_unavailable: Any = "deny", **options: Any) -> Post:
        blocking = FakeClient(service, on_unavailable=on_unavailable)
        waiting = AsyncFakeClient(service, on_unavailable=on_unavailable)
        return guarded(request.param, shop, blocking, waiting, **options)

    return make


def refused(answer: httpx.Response, status: int, heading: str) -> bool:
    """Return whether an answer is this problem document."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    return str(answer.json()["type"]).endswith(f"#{heading}")


async def test_the_first_response_is_replayed(live: Callable[..., Post], shop: Shop, unique: str) -> None:
    """Status, listed headers and body, marked as replayed. The work is done once."""
    post = live(stored_headers=["X-Reward"])
    shop.extra = [("ETag", '"7"'), ("Content-Language", "de")]
    first = await post("/located", b"5", idempotency_key=unique)
    again = await post("/located", b"5", idempotency_key=f'"{unique}"')
    assert (first.status_code, first.json(), shop.payments) == (201, {"paid": 1}, [b"5"])
    assert (again.status_code, again.content) == (first.status_code, first.content)
    for name in ("content-type", "location", "etag", "content-language", "x-reward"):
        assert again.headers[name] == first.headers[name]
    assert (first.headers["set-cookie"], again.headers.get("set-cookie")) == ("session=1", None)
    assert (first.headers.get("idempotency-replayed"), again.headers["idempotency-replayed"]) == (None, "true")


async def test_another_request_under_the_key_is_refused(post: Post, shop: Shop, unique: str) -> None:
    """Another body or query gets 422. Another path is another request."""
    await post("/pay", b"5", idempotency_key=unique)
    assert refused(await post("/pay", b"6", idempotency_key=unique), 422, "key-reused")
    assert refused(await post("/pay?a=1", b"5", idempotency_key=unique), 422, "key-reused")
    assert (await post("/other", b"5", idempotency_key=unique)).status_code == 201
    assert shop.payments == [b"5", b"5"]


async def test_unguarded_requests_pass(post: Post, shop: Shop, unique: str) -> None:
    """Requests without a key, and with another method."""
    for _ in range(2):
        await post("/pay")
        await post("/pay", method="GET", idempotency_key=unique)
    assert len(shop.payments) == 4


async def test_each_status_does_what_the_contract_says(post: Post, shop: Shop, unique: str) -> None:
    """Completed requests are replayed, released ones run again, kept ones are in progress."""
    for case in STATUSES:
        path, before = f"/status/{case['status']}", len(shop.payments)
        first, again = [await post(path, idempotency_key=unique) for _ in range(2)]
        assert (first.status_code, "idempotency-replayed" in first.headers) == (case["status"], False)
        runs = len(shop.payments) - before
        match case["does"]:
            case "complete":
                assert (runs, again.status_code, again.content) == (1, first.status_code, first.content)
                assert again.headers["idempotency-replayed"] == "true"
            case "release":
                assert (runs, again.status_code) == (2, case["status"])
            case _:
                assert runs == 1
                assert refused(again, 409, "in-progress")


async def test_a_401_is_not_replayed(post: Post, shop: Shop, unique: str) -> None:
    """The caller corrects the request, here by a login, and sends it again under the same key."""
    assert (await post("/status/401", idempotency_key=unique)).status_code == 401
    shop.failing = False
    assert (await post("/status/401", idempotency_key=unique)).json() == {"paid": 2}


async def test_an_exception_keeps_the_claim(post: Post, shop: Shop, unique: str) -> None:
    """Its effect is unknown, so the work is not done again."""
    with pytest.raises(ZeroDivisionError):
        await post("/raise", idempotency_key=unique)
    shop.failing = False
    assert refused(await post("/raise", idempotency_key=unique), 409, "in-progress")
    assert len(shop.payments) == 1


@pytest.mark.parametrize(("kind", "case"), STREAMED)
async def test_what_counts_as_streamed(shop: Shop, service: FakeService, kind: str, case: dict[str, Any]) -> None:
    """Event streams, large responses, and what Django streams. Small responses are replayed, in however many parts."""
    shop.content_type, shop.flushes = case["content_type"], case["flushed"]
    shop.parts = [b"x" * size for size in case["parts"]]
    post = guarded(kind, shop, FakeClient(service), AsyncFakeClient(service))
    first, again = [await post("/pay", idempotency_key="k") for _ in range(2)]
    assert (first.status_code, len(first.content), len(shop.payments)) == (201, sum(case["parts"]), 1)
    if case["streamed"]:
        assert refused(again, 410, "response-not-stored")
    else:
        assert (again.status_code, again.content) == (201, first.content)


@pytest.mark.parametrize("path", ["/large", "/large/stream"])
async def test_a_response_that_is_not_stored(post: Post, shop: Shop, unique: str, path: str) -> None:
    """A large or streamed response is delivered once. Duplicates get 410, or are sent to its Location."""
    first = await post(path, idempotency_key=unique)
    assert len(first.content) == 5_000
    again = await post(path, idempotency_key=unique)
    assert refused(again, 410, "response-not-stored")
    assert again.headers["idempotency-replayed"] == "true"
    assert (await post("/located" + path, idempotency_key=unique)).status_code == 201
    see = await post("/located" + path, idempotency_key=unique)
    assert (see.status_code, see.headers["location"], see.content) == (303, "/rewards/17", b"")
    assert len(shop.payments) == 2


async def test_a_request_in_progress_is_a_conflict(post: Post, shop: Shop, unique: str) -> None:
    """It gets 409 until the work ends, then its response. The refusal names neither id nor claimant."""
    first = asyncio.ensure_future(post("/slow", idempotency_key=unique))
    assert await asyncio.to_thread(shop.entered.wait, 60)
    meanwhile = await post("/slow", idempotency_key=unique)
    assert refused(meanwhile, 409, "in-progress")
    assert meanwhile.headers["retry-after"] == "1"
    assert unique not in meanwhile.text
    shop.leave.set()
    assert (await first).json() == (await post("/slow", idempotency_key=unique)).json() == {"paid": 1}


async def test_a_duplicate_may_wait(live: Callable[..., Post], shop: Shop, unique: str) -> None:
    """It receives the first response when the work ends."""
    post = live(wait=60)
    first = asyncio.ensure_future(post("/slow", idempotency_key=unique))
    assert await asyncio.to_thread(shop.entered.wait, 60)
    second = asyncio.ensure_future(post("/slow", idempotency_key=unique))
    shop.leave.set()
    assert (await first).json() == (await second).json() == {"paid": 1}
    assert len(shop.payments) == 1


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
    assert refused(denied, 503, "unavailable")
    assert denied.headers["retry-after"] == "1"
    assert not shop.payments
    assert (await post_with("allow")("/pay", idempotency_key="k")).status_code == 201


@pytest.mark.parametrize("path", ["/pay", "/large/stream", "/status/404"])
async def test_a_response_is_delivered_if_its_claim_cannot_end(
    post_with: Callable[..., Post], shop: Shop, service: FakeService, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """The work is done, and a warning is logged."""
    work = shop.handle

    def handle(path: str, body: bytes) -> Any:
        service.unavailable = True
        return work(path, body)

    shop.handle = handle  # type: ignore[method-assign]
    answer = await post_with()(path, idempotency_key="k")
    assert answer.status_code == (404 if "404" in path else 201)
    assert "could not end the claim" in caplog.text


async def test_a_key_may_be_required_and_must_be_valid(post_with: Callable[..., Post], shop: Shop) -> None:
    """A missing, empty, double or too long key gets 400."""
    post = post_with(required=True)
    for key in ({}, {"idempotency_key": '""'}, {"idempotency_key": "a,b"}, {"idempotency_key": "x" * 600}):
        assert refused(await post("/pay", **key), 400, "key-invalid")
    assert (await post("/pay", method="GET")).status_code == 201
    assert len(shop.payments) == 1


async def test_callers_have_keys_of_their_own(post_with: Callable[..., Post], shop: Shop) -> None:
    """The same key from two users is two requests."""
    post = post_with(caller=lambda request: request.headers["x-user"])
    for user in ("anna", "ben", "anna"):
        await post("/pay", idempotency_key="k", x_user=user)
    assert len(shop.payments) == 2


async def test_hooks_receive_the_request(post_with: Callable[..., Post]) -> None:
    """Method, path, query, headers, and what the framework made of it."""
    seen: list[Any] = []

    def caller(request: Any) -> str:
        seen.append(request)
        return ""

    post = post_with(caller=caller)
    await post("/p%20q?a=%20", b"5", idempotency_key="k", content_type="text/plain")
    assert (seen[0].method, seen[0].path, seen[0].query) == ("POST", "/p q", b"a=%20")
    assert seen[0].headers["content-type"] == "text/plain"
    assert isinstance(seen[0].native, dict | HttpRequest)


async def test_a_hook_replaces_the_body_in_the_fingerprint(post_with: Callable[..., Post], shop: Shop) -> None:
    """Two spellings of the same JSON are the same request."""
    post = post_with(fingerprint=lambda _, body: json.dumps(json.loads(body), sort_keys=True).encode())
    for body in (b'{"a":1,"b":2}', b'{"b": 2, "a": 1}'):
        assert (await post("/pay", body, idempotency_key="k")).status_code == 201
    assert refused(await post("/pay", b'{"a":2}', idempotency_key="k"), 422, "key-reused")
    assert shop.payments == [b'{"a":1,"b":2}']


async def test_a_predicate_says_what_a_status_does(post_with: Callable[..., Post], shop: Shop) -> None:
    """Here 402 is kept, and 404 is replayed."""
    does = {402: "keep", 404: "complete"}
    post = post_with(outcome=lambda status: does.get(status) or outcome_of(status))
    kept = [await post("/status/402", idempotency_key="k") for _ in range(2)]
    completed = [await post("/status/404", idempotency_key="k") for _ in range(2)]
    assert [answer.status_code for answer in kept + completed] == [402, 409, 404, 404]
    assert len(shop.payments) == 2


async def test_the_mark_of_a_replay_is_an_option(post_with: Callable[..., Post]) -> None:
    """It has another name, or is left out."""
    await post_with()("/pay", idempotency_key="k")
    renamed = await post_with(replayed_header="X-Replayed")("/pay", idempotency_key="k")
    without = await post_with(replayed_header=None)("/pay", idempotency_key="k")
    assert (renamed.headers["x-replayed"], renamed.headers.get("idempotency-replayed")) == ("true", None)
    assert (without.status_code, without.headers.get("idempotency-replayed")) == (201, None)


async def test_limits_are_options(post_with: Callable[..., Post], shop: Shop) -> None:
    """A body above its limit gets 413; a response above its limit is not stored."""
    post = post_with(max_body_bytes=10, max_stored_bytes=80)
    answer = await post("/pay", b"x" * 11, idempotency_key="k")
    assert refused(answer, 413, "body-too-large")
    assert "up to 10 bytes" in answer.json()["detail"]
    assert (await post("/pay", b"x" * 10, idempotency_key="k")).status_code == 201
    assert (await post("/pay", b"x" * 10, idempotency_key="k")).status_code == 201
    assert shop.payments == [b"x" * 10]
    tight = post_with(max_stored_bytes=30)
    assert (await tight("/other", idempotency_key="k")).status_code == 201
    assert refused(await tight("/other", idempotency_key="k"), 410, "response-not-stored")


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


async def test_a_foreign_result_is_not_a_response(post_with: Callable[..., Post], service: FakeService) -> None:
    """A result that no guard stored is never sent."""
    with FakeClient(service).claim("http::POST:/pay:k") as claim:
        claim.result = b"something else"
    assert refused(await post_with()("/pay", idempotency_key="k"), 410, "response-not-stored")


async def test_the_work_sees_its_claim(post_with: Callable[..., Post], shop: Shop) -> None:
    """It is the current claim while the request is handled, also in a thread of the framework."""
    post = post_with()
    await post("/pay", idempotency_key="k")
    await post("/pay")
    assert [claim and claim.transaction_id for claim in shop.claims] == ["http::POST:/pay:k", None]
    assert current_claim() is None


async def test_a_mounted_application_has_the_whole_path(shop: Shop, service: FakeService) -> None:
    """The prefix belongs to the identity, in ASGI and in WSGI."""
    inner = Starlette(
        routes=starlette_app(shop).routes,
        middleware=[Middleware(asgi.IdempotencyMiddleware, client=AsyncFakeClient(service))],
    )
    await over_asgi(Starlette(routes=[Mount("/shop", inner)]))("/shop/pay", idempotency_key="k")
    mounted = DispatcherMiddleware(
        flask_app(shop), {"/shop": wsgi.IdempotencyMiddleware(flask_app(shop), FakeClient(service))}
    )
    again = await over_wsgi(mounted)("/shop/pay", idempotency_key="k")
    assert (again.json(), again.headers["idempotency-replayed"]) == ({"paid": 1}, "true")
    request: Any = service.calls[0][1]
    assert request.transaction_id == "http::POST:/shop/pay:k"


class Passing(BaseHTTPMiddleware):
    """Starlette middleware that reads the response and passes it on in parts."""

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["X-Passed"] = "yes"
        return response


@pytest.mark.parametrize("order", ["outside", "inside", "both"])
async def test_http_middleware_of_starlette(target: str, shop: Shop, unique: str, order: str) -> None:
    """BaseHTTPMiddleware runs the application in another task and passes its response on in parts."""
    async with aio.Client(target) as client:
        guard = Middleware(asgi.IdempotencyMiddleware, client=client)
        passing = Middleware(Passing)
        middleware = {"outside": [passing, guard], "inside": [guard, passing], "both": [passing, guard, passing]}[order]
        post = over_asgi(Starlette(routes=starlette_app(shop).routes, middleware=middleware))
        first, again = [await post("/pay", b"5", idempotency_key=unique) for _ in range(2)]
        assert (first.status_code, first.json(), again.status_code, again.content) == (
            201,
            {"paid": 1},
            201,
            first.content,
        )
        assert again.headers["idempotency-replayed"] == "true"
        assert (again.headers.get("x-passed") is None) is (order == "inside")
        assert shop.claims[0].transaction_id == f"http::POST:/pay:{unique}"
        with pytest.raises(ZeroDivisionError):
            await post("/raise", idempotency_key=unique)
        assert refused(await post("/raise", idempotency_key=unique), 409, "in-progress")
        assert (await post("/large", idempotency_key=unique)).status_code == 201
        assert refused(await post("/large", idempotency_key=unique), 410, "response-not-stored")
        assert len(shop.payments) == 3


@pytest.mark.parametrize("options", [{}, {"keep_alive": False}, {"max_hold": 60}])
def test_a_guard_claims_with_keep_alive(options: dict[str, Any]) -> None:
    """Claims are kept alive by default, up to `max_hold`."""
    request = idempotency.Request("POST", "/pay", b"", {}, None)
    made = idempotency.Rules(**options).claim_options(request, b"")
    assert (made["keep_alive"], made["max_hold"]) == (options.get("keep_alive", True), options.get("max_hold"))


async def test_work_longer_than_its_ttl_runs_once(
    post_with: Callable[..., Post], shop: Shop, service: FakeService
) -> None:
    """The guard keeps the claim alive while the request is handled."""
    work = shop.handle

    def handle(path: str, body: bytes) -> Any:
        service.advance(150)
        return work(path, body)

    shop.handle = handle  # type: ignore[method-assign]
    post = post_with(ttl=60)
    first, again = [await post("/pay", idempotency_key="k") for _ in range(2)]
    assert (first.json(), again.json(), len(shop.payments)) == ({"paid": 1}, {"paid": 1}, 1)


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
    await guarded(POST, gone, unexpected)
    await guarded({"type": "lifespan"}, gone, unexpected)
    assert (seen, service.calls) == (["lifespan"], [])


async def test_two_key_headers_are_refused() -> None:
    """ASGI has a list of headers; servers join them for WSGI."""
    service, statuses = FakeService(), []

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    async def app(*_: Any) -> None:
        raise AssertionError("the request is not handled")

    scope = POST | {"headers": [(b"idempotency-key", b"k"), (b"Idempotency-Key", b"k")]}
    await asgi.IdempotencyMiddleware(app, AsyncFakeClient(service))(scope, empty_request, send)
    assert (statuses, service.calls) == ([400, None], [])


POST: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": [(b"idempotency-key", b"k")]}
ENVIRON = {"REQUEST_METHOD": "POST", "PATH_INFO": "/", "HTTP_IDEMPOTENCY_KEY": "k"}


async def empty_request() -> Any:
    """Return a request without a body."""
    return {"type": "http.request"}


@pytest.mark.parametrize("length", [None, 2])
async def test_asgi_passes_a_stream_on_and_completes_before_its_end(length: int | None) -> None:
    """Each part leaves at once, and the claim is completed before the last byte."""
    service = FakeService()
    seen: list[tuple[str, str]] = []
    headers = [(b"content-type", b"text/event-stream")] if length is None else [(b"content-length", b"2")]

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in (b"a", b"b"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    async def send(message: Any) -> None:
        seen.append((message.get("body", b"").decode(), service.calls[-1][0]))

    await asgi.IdempotencyMiddleware(app, AsyncFakeClient(service), max_stored_bytes=0)(POST, empty_request, send)
    claimed, completed = "ClaimTransaction", "CompleteTransaction"
    last = completed if length else claimed
    assert seen == [("", claimed), ("a", claimed), ("b", last), ("", completed)]


@pytest.mark.parametrize("length", [None, 2])
def test_wsgi_passes_a_stream_on_and_completes_before_its_end(length: int | None) -> None:
    """Each part leaves at once, and the claim is completed before the last byte."""
    service, closed, steps = FakeService(), [], []

    class Parts:
        def __iter__(self) -> Iterator[bytes]:
            for part in (b"a", b"b"):
                steps.append(part)
                yield part

        def close(self) -> None:
            closed.append(True)

    def app(_environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/event-stream") if length is None else ("Content-Length", "2")])
        return Parts()

    guarded = wsgi.IdempotencyMiddleware(app, FakeClient(service), max_stored_bytes=0)
    chunks: Any = guarded(dict(ENVIRON), lambda *_: bytes)
    seen = [(chunk, len(steps), service.calls[-1][0]) for chunk in chunks]
    last = "CompleteTransaction" if length else "ClaimTransaction"
    assert seen == [(b"a", 1, "ClaimTransaction"), (b"b", 2, last)]
    assert service.calls[-1][0] == "CompleteTransaction"
    chunks.close()
    assert closed == [True]


def test_wsgi_keeps_the_claim_of_a_stream_that_ends_early() -> None:
    """The server closes the response of a caller that left; an exception in the stream is doubt, too."""
    service = FakeService()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        yield b"a"
        if environ["PATH_INFO"] == "/raise":
            raise ZeroDivisionError
        yield b"b"

    guarded = wsgi.IdempotencyMiddleware(app, FakeClient(service))
    left: Any = guarded(dict(ENVIRON), lambda *_: bytes)
    next(left)
    left.close()
    with pytest.raises(ZeroDivisionError):
        list(guarded(ENVIRON | {"PATH_INFO": "/raise"}, lambda *_: bytes))
    assert [method for method, _ in service.calls] == ["ClaimTransaction"] * 2


def test_wsgi_passes_on_written_data() -> None:
    """The `write` callable and `close` of the result work as they do without the middleware."""
    closed = []

    class Result(list[bytes]):
        def close(self) -> None:
            closed.append(True)

    def app(_environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])(b"written ")
        return Result([b"returned"])

    started: list[Any] = []
    guarded = wsgi.IdempotencyMiddleware(app, FakeClient())
    bodies = [b"".join(guarded(dict(ENVIRON), lambda *parts: started.append(parts))) for _ in range(2)]  # type: ignore[arg-type]
    assert bodies == [b"written returned"] * 2
    assert closed == [True]
    assert started[1][1] == [("content-type", "text/plain"), ("Idempotency-Replayed", "true"), ("content-length", "16")]


async def test_a_cancelled_request_still_completes() -> None:
    """The work is done, so its claim is completed although the caller's task is cancelled meanwhile."""
    service = FakeService()
    client, entered, leave = AsyncFakeClient(service), asyncio.Event(), asyncio.Event()
    answer = client._transport.send

    async def slow(step: Any) -> Any:
        if step.method == "CompleteTransaction":
            entered.set()
            await leave.wait()
        return await answer(step)

    client._transport.send = slow  # type: ignore[method-assign]

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def send(_message: Any) -> None:
        """Take the response."""

    request = asyncio.ensure_future(asgi.IdempotencyMiddleware(app, client)(POST, empty_request, send))
    await entered.wait()
    request.cancel()
    await asyncio.wait([request])
    leave.set()
    await asyncio.gather(*idempotency._ENDINGS)
    found = await client.get("http::POST:/:k")
    assert found is not None
    assert (request.cancelled(), found.completed) == (True, True)


async def test_django_completes_an_asynchronous_stream_before_its_end(service: FakeService) -> None:
    """Each part leaves at once; a caller that leaves keeps the claim."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    async def view(_: HttpRequest) -> Any:
        return StreamingHttpResponse(parts())

    middleware = DjangoMiddleware(AsyncFakeClient(service))
    for path in ("/whole", "/left"):
        request = WSGIRequest(ENVIRON | {"PATH_INFO": path, "wsgi.input": io.BytesIO()})
        response = await middleware(view)(request)
        seen = []
        async for part in response.streaming_content:
            seen.append((part, service.calls[-1][0]))
            if path == "/left":
                break
        response.close()
        await asyncio.sleep(0)
        assert seen == [(b"a", "ClaimTransaction"), (b"b", "ClaimTransaction")][: len(seen)]
        assert service.calls[-1][0] == ("CompleteTransaction" if path == "/whole" else "ClaimTransaction")
