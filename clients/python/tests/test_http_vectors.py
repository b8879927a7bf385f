"""Golden vectors of the HTTP profile: the pure functions, and the identities through each middleware."""

import asyncio
import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import django
import pytest
from django.conf import settings
from django.core.handlers.asgi import ASGIRequest
from django.core.handlers.wsgi import WSGIRequest

from dedup import asgi, http_profile, wsgi
from dedup.django import IdempotencyMiddleware as DjangoMiddleware
from dedup.http_profile import InvalidKey, Response
from dedup.idempotency import Options, Rules
from dedup.stored_response import MAX_STORED_BYTES, STORED_HEADERS, decode, encode
from dedup.testing import AsyncFakeClient, FakeClient, FakeService

VECTORS = json.loads((Path(__file__).parents[2] / "golden" / "http.json").read_text())
KINDS = [
    "asgi",
    "asgi without raw_path",
    "wsgi",
    "wsgi with REQUEST_URI",
    "wsgi with RAW_URI",
    "mounted",
    "mounted without raw_path",
    "django",
    "django with RAW_URI",
]
DECODED = ["asgi without raw_path", "mounted without raw_path", "wsgi", "django"]

if not settings.configured:
    settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF="", LOGGING_CONFIG=None, USE_TZ=True)
    django.setup()


def bytes_of(text: str) -> bytes:
    """Decode base64."""
    return base64.b64decode(text)


def test_defaults() -> None:
    """The options of each middleware start with the contract's values, and are the same."""
    defaults = VECTORS["defaults"]
    rules = Rules()
    assert list(rules.methods) == defaults["methods"]
    assert rules.max_body_bytes == defaults["max_body_bytes"]
    assert rules.max_stored_bytes == defaults["max_stored_bytes"] == MAX_STORED_BYTES
    assert rules.replayed_header == defaults["replayed_header"]
    assert sorted(STORED_HEADERS) == defaults["stored_headers"]
    assert defaults["key_header"].lower() == http_profile.KEY_HEADER
    assert rules.keep_alive
    assert {field.name for field in dataclasses.fields(Rules)} == set(Options.__annotations__)


@pytest.mark.parametrize("case", VECTORS["keys"], ids=repr)
def test_a_valid_key(case: dict[str, Any]) -> None:
    """A quoted key and a bare one are equal."""
    assert http_profile.key_of(case["headers"]) == case["key"]


@pytest.mark.parametrize("case", VECTORS["invalid_keys"], ids=repr)
def test_an_invalid_key(case: dict[str, Any]) -> None:
    """It is refused, never repaired."""
    with pytest.raises(InvalidKey):
        http_profile.key_of(case["headers"])


@pytest.mark.parametrize("case", VECTORS["identities"], ids=lambda case: case["transaction_id"])
def test_an_identity(case: dict[str, Any]) -> None:
    """The path is that of the request target, percent-decoded once."""
    path = http_profile.path_of(case["target"].encode())
    key = http_profile.key_of([case["header"]])
    assert path == case["path"]
    assert http_profile.identity(case["caller"], case["method"], path, key) == case["transaction_id"]


def send(kind: str, service: FakeService, case: dict[str, Any], body: bytes = b"") -> int:
    """Send a request with the target of a vector through one middleware, and return the status."""
    target, caller = case["target"], case.get("caller", "")
    options: Options = {"caller": lambda _: caller}
    raw_path, _, query = target.partition("?")
    path = unquote_to_bytes(raw_path)
    statuses: list[int] = []
    scope: dict[str, Any] = {
        "type": "http",
        "method": case["method"],
        "path": path.decode("utf-8", "surrogateescape"),
        "query_string": query.encode(),
        "headers": [(b"Idempotency-Key", case["header"].encode())],
    }
    environ: dict[str, Any] = {
        "REQUEST_METHOD": case["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": path.decode("latin-1"),
        "QUERY_STRING": query,
        "HTTP_IDEMPOTENCY_KEY": case["header"],
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
    }
    if "django" in kind:
        environ |= {"RAW_URI": target} if "with" in kind else {}
        middleware = DjangoMiddleware(FakeClient(service), **options)
        request = WSGIRequest(environ)
        response: Any = middleware(lambda _: django.http.HttpResponse(status=201))(request)
        return int(response.status_code)
    if "wsgi" in kind:

        def app(_environ: Any, start_response: Any) -> list[bytes]:
            start_response("201 Created", [])
            return [b""]

        if "with" in kind:
            environ[kind.removeprefix("wsgi with ")] = target
        guarded = wsgi.IdempotencyMiddleware(app, FakeClient(service), **options)
        list(guarded(environ, lambda status, *_: statuses.append(int(status.split()[0]))))  # type: ignore[arg-type]
        return statuses[0]

    async def waiting_app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        return {"type": "http.request", "body": body}

    async def sent(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    if "without" not in kind:
        scope["raw_path"] = raw_path.encode()
    if "mounted" in kind:
        scope |= {"root_path": scope["path"][:2], "path": scope["path"][2:]}
    asyncio.run(asgi.IdempotencyMiddleware(waiting_app, AsyncFakeClient(service), **options)(scope, receive, sent))
    return statuses[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", VECTORS["identities"], ids=lambda case: case["transaction_id"])
def test_each_middleware_makes_the_same_identity(kind: str, case: dict[str, Any]) -> None:
    """Whatever a server gives the application, the transaction id is the contract's."""
    service = FakeService()
    assert send(kind, service, case) == 201
    request: Any = service.calls[0][1]
    assert request.transaction_id == case["transaction_id"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DECODED])
@pytest.mark.parametrize("case", VECTORS["invalid_identities"], ids=lambda case: case["why"])
def test_each_middleware_refuses_an_invalid_identity(kind: str, case: dict[str, Any]) -> None:
    """The request gets 400 and makes no claim."""
    service = FakeService()
    assert (send(kind, service, case), service.calls) == (400, [])


@pytest.mark.parametrize("case", VECTORS["invalid_identities"], ids=lambda case: case["why"])
def test_a_server_that_decodes_the_path_hides_its_faults(case: dict[str, Any]) -> None:
    """The path is what the server makes of it: invalid escapes stay, and Django escapes what is not UTF-8."""
    if "512" in case["why"]:
        expected = dict.fromkeys(DECODED, "")
    else:
        made = "http::POST:" + case["target"].replace("%", "%25") + ":k"
        refuses = "UTF-8" in case["why"]
        expected = {kind: "" if refuses and kind != "django" else made for kind in DECODED}
    for kind in DECODED:
        service = FakeService()
        assert send(kind, service, case) == (201 if expected[kind] else 400)
        made_by_kind: list[Any] = [request for _, request in service.calls[:1]]
        assert [request.transaction_id for request in made_by_kind] == [expected[kind]] * bool(expected[kind])


def test_a_decoded_path_that_is_not_utf_8_is_named() -> None:
    """ASGI servers mark its bytes by surrogates."""
    scope = {"method": "POST", "path": "/caf\udce9", "headers": []}
    with pytest.raises(InvalidKey, match="not UTF-8"):
        asgi.request_of(scope, scope)


@pytest.mark.parametrize("case", VECTORS["invalid_identities"], ids=lambda case: case["why"])
def test_the_detail_of_an_invalid_identity(case: dict[str, Any]) -> None:
    """It says what is wrong, in the words of every client."""
    with pytest.raises(InvalidKey) as raised:
        http_profile.identity("", case["method"], http_profile.path_of(case["target"].encode()), case["header"])
    assert json.loads(http_profile.key_invalid(raised.value).body)["detail"] == case["detail"]


def test_django_over_asgi_makes_the_same_identity() -> None:
    """The scope has the target as the client sent it."""
    for case in VECTORS["identities"]:
        service, (raw_path, _, query) = FakeService(), case["target"].partition("?")
        scope = {
            "method": case["method"],
            "path": case["path"],
            "raw_path": raw_path.encode(),
            "query_string": query.encode(),
            "headers": [(b"idempotency-key", case["header"].encode())],
        }
        middleware = DjangoMiddleware(AsyncFakeClient(service), caller=lambda _, case=case: case["caller"])  # type: ignore[misc]

        async def view(_: Any) -> Any:
            return django.http.HttpResponse(status=201)

        asyncio.run(middleware(view)(ASGIRequest(scope, io.BytesIO())))
        request: Any = service.calls[0][1]
        assert request.transaction_id == case["transaction_id"]


@pytest.mark.parametrize("case", VECTORS["fingerprints"], ids=lambda case: case["fingerprint"][:8])
def test_a_fingerprint(case: dict[str, Any]) -> None:
    """Method, path, query and body, each with its length, also through the middleware."""
    path, _, query = case["target"].partition("?")
    body = bytes_of(case["body"])
    made = http_profile.fingerprint(case["method"], http_profile.path_of(path.encode()), query.encode(), body)
    assert made.hex() == case["fingerprint"]
    for kind in ("asgi", "wsgi", "django"):
        service = FakeService()
        send(kind, service, case | {"header": "k"}, body)
        request: Any = service.calls[0][1]
        assert request.payload_fingerprint.hex() == case["fingerprint"]


@pytest.mark.parametrize("case", VECTORS["stored"], ids=lambda case: case["name"])
def test_a_stored_response(case: dict[str, Any]) -> None:
    """Listed headers by name, then the body, within the limit."""
    response = Response(case["status"], tuple((name, value) for name, value in case["headers"]), bytes_of(case["body"]))
    stored = encode(response, extra_headers=case["extra_headers"], limit=case["limit"], streamed=case["streamed"])
    assert stored == bytes_of(case["stored"])


@pytest.mark.parametrize("case", VECTORS["readable"], ids=lambda case: case["name"])
def test_a_readable_response(case: dict[str, Any]) -> None:
    """The current format and the two older ones are read; anything else is not."""
    stored = decode(bytes_of(case["stored"]))
    if case["kind"] == "unreadable":
        assert stored is None
        return
    assert stored is not None
    body = None if case["body"] is None else bytes_of(case["body"])
    assert (stored.status, [list(header) for header in stored.headers]) == (case["status"], case["headers"])
    assert stored.body == body
    assert (stored.body is None) is (case["kind"] == "no-body")


@pytest.mark.parametrize("case", VECTORS["statuses"], ids=lambda case: str(case["status"]))
def test_a_status(case: dict[str, Any]) -> None:
    """Each status completes, releases or keeps the claim."""
    assert http_profile.outcome_of(case["status"]) == case["does"]


@pytest.mark.parametrize("case", VECTORS["refusals"], ids=lambda case: case["name"])
def test_a_refusal(case: dict[str, Any]) -> None:
    """Status, headers and body."""
    made = {
        "in-progress": http_profile.in_progress,
        "response-not-stored": lambda: Rules()._replay(b""),
        "key-reused": http_profile.key_reused,
        "key-invalid": lambda: http_profile.key_invalid(invalid_key()),
        "body-too-large": lambda: http_profile.body_too_large(7),
        "unavailable": http_profile.unavailable,
    }[case["name"]]()
    assert made.status == case["status"]
    assert {name.lower(): value for name, value in made.headers} == case["headers"]
    detail = case["body"]["detail"].replace("{limit}", "7")
    assert json.loads(made.body) == case["body"] | {"detail": detail}


def test_a_redirect() -> None:
    """A response that is not stored is replaced by its Location."""
    stored = encode(Response(201, (("Location", "/rewards/17"),), b"x"), streamed=True)
    made, expected = Rules()._replay(stored), VECTORS["redirect"]
    assert (made.status, made.body.decode()) == (expected["status"], expected["body"])
    assert {name.lower(): value for name, value in made.headers} == expected["headers"]


def invalid_key() -> InvalidKey:
    """Return the error of an invalid key."""
    with pytest.raises(InvalidKey) as raised:
        http_profile.key_of([""])
    return raised.value
