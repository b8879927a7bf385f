"""`dedup-service conformance` against services with one fault each: exactly the check of the broken rule fails."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dedup.idempotency import Options
from dedup_service.conformance.checks import CHECKS
from dedup_service.conformance.contract import (
    KEY_HEADER,
    MAX_BODY_BYTES,
    PAGE,
    REFUSALS,
    REPLAYED_HEADER,
    STORED_HEADERS,
)
from dedup_service.conformance.run import Result, Status, reached, run_checks
from dedup_service.conformance.subject import Plan
from tests.support.guarded_service import (
    BODY,
    CLAIMANT,
    FAILING,
    KEY,
    LARGE,
    LARGE_WITH_LOCATION,
    REJECTED,
    SLOW,
    ASGIApp,
    Rewards,
    Wrap,
    altered,
    guarded,
    keys_of,
    rekeyed,
    rescoped,
    served,
)

pytestmark = pytest.mark.conformance

Headers = dict[bytes, bytes]
ROOT = Path(__file__).parents[3]
NAMES = [check.name for check in CHECKS]


def plan_for(*base_urls: str, **changes: Any) -> Plan:
    """Return a plan with every body."""
    bodies = {
        "body": BODY,
        "rejected_body": REJECTED,
        "failing_body": FAILING,
        "slow_body": SLOW,
        "large_body": LARGE,
        **{name: changes.pop(name) for name in list(changes) if name.endswith("body")},
    }
    encoded: dict[str, Any] = {name: json.dumps(body).encode() for name, body in bodies.items()}
    return Plan(base_urls=base_urls, route="/rewards", other_route="/others", claimant=CLAIMANT, **encoded, **changes)


async def results_of(app: ASGIApp, **changes: Any) -> dict[str, Result]:
    """Return the result of each check of a service."""
    async with served(app) as url, reached(plan_for(url, **changes)) as subject:
        return {result.check.name: result async for result in run_checks(subject)}


def names(results: Mapping[str, Result], status: Status) -> set[str]:
    """Return the checks that ended so."""
    return {name for name, result in results.items() if result.status is status}


def replays(change: Any) -> Wrap:
    """Return a fault of replays with a body."""
    return altered(
        lambda status, headers, body, key: (
            change(status, headers, body, key)
            if b"idempotency-replayed" in headers and status == 201
            else (status, headers, body)
        )
    )


def refusals(of: int, change: Any) -> Wrap:
    """Return a fault in the problem documents of a status. `change` alters headers and members in place."""

    def changed(status: int, headers: Headers, body: bytes, key: bytes) -> tuple[int, Headers, bytes]:
        if status != of or b"problem" not in headers.get(b"content-type", b""):
            return status, headers, body
        members = json.loads(body)
        change(headers, members, key.decode())
        return status, headers, json.dumps(members).encode()

    return altered(changed)


def old_cookie() -> Wrap:
    """Send the first Set-Cookie of a key with its replays too."""
    cookies: dict[bytes, bytes] = {}

    def change(status: int, headers: Headers, body: bytes, key: bytes) -> tuple[int, Headers, bytes]:
        name = key.strip(b'"')
        if b"set-cookie" in headers:
            cookies[name] = headers[b"set-cookie"]
        elif name in cookies:
            headers[b"set-cookie"] = cookies[name]
        return status, headers, body

    return altered(change)


def repeated_rejection() -> Wrap:
    """Mark the second rejection under a key as a replay, as a guard does that stores a 4xx by its body."""
    rejected: Counter[bytes] = Counter()

    def change(status: int, headers: Headers, body: bytes, key: bytes) -> tuple[int, Headers, bytes]:
        if status == 400 and b"problem" not in headers[b"content-type"]:
            rejected[key] += 1
            if rejected[key] > 1:
                headers[b"idempotency-replayed"] = b"true"
        return status, headers, body

    return altered(change)


def race(allowed: int, only: bytes = b"") -> Wrap:
    """Let a request run under a key of its own if `allowed` others with its key are in flight, or were meanwhile."""
    fresh = (b"race-%d" % number for number in itertools.count())

    def wrap(app: ASGIApp) -> ASGIApp:
        in_flight: Counter[bytes] = Counter()
        arrived: Counter[bytes] = Counter()

        async def wrapped(scope: Any, receive: Any, send: Any) -> None:
            message = await receive()
            key = scope["sent_key"]
            broken = bool(key) and only in message.get("body", b"") and arrived[key] >= allowed
            in_flight[key] += 1
            arrived[key] += 1
            headers = [header for header in scope["headers"] if header[0] != KEY]
            pending = [message]

            async def again() -> Any:
                return pending.pop() if pending else await receive()

            try:
                await app({**scope, "headers": [*headers, (KEY, next(fresh))]} if broken else scope, again, send)
            finally:
                in_flight[key] -= 1
                if not in_flight[key]:
                    del arrived[key]

        return wrapped

    return wrap


def without_key_guarded(scope: Any) -> dict[str, Any]:
    """Give requests without a key one of their own, always the same."""
    return {} if keys_of(scope) else {"headers": [*scope["headers"], (KEY, b"none")]}


def dropped(headers: Headers, name: bytes) -> Headers:
    """Return the headers without one."""
    return {other: value for other, value in headers.items() if other != name}


def with_type(kind: str) -> Any:
    """Return a change of the type of a problem document."""
    return lambda _headers, members, _key: members.update(type=kind)


# The fault, the options of the guard, and the checks that fail. Checks after a "?" may fail, depending on timing.
FAULTS: dict[str, tuple[Wrap | None, Options, str]] = {
    "runs repeats again": (
        None,
        {"outcome": lambda status: "keep" if status >= 500 else "release"},
        "replay quoted-key encoded-path slow large other-body other-query ? concurrent",
    ),
    "changes the replayed status": (
        replays(lambda _, headers, body, __: (200, headers, body)),
        {},
        "replay quoted-key encoded-path slow ? concurrent",
    ),
    "replays without Location": (
        replays(lambda status, headers, body, _: (status, dropped(headers, b"location"), body)),
        {},
        "replay-headers",
    ),
    "replays another ETag": (
        replays(lambda status, headers, body, _: (status, {**headers, b"etag": b'"x"'}, body)),
        {},
        "replay-headers",
    ),
    "does not mark replays": (None, {"replayed_header": None}, "replay-mark large ? concurrent"),
    "replays Set-Cookie": (old_cookie(), {}, "set-cookie"),
    "tells quoted from bare keys": (
        rekeyed(lambda keys: [re.sub(rb'^"([\w-]+)"$', rb"quoted-\1", key) for key in keys]),
        {},
        "quoted-key",
    ),
    "refuses quoted keys": (rekeyed(lambda keys: [key.replace(b'"', b'""') for key in keys]), {}, "quoted-key"),
    "does not decode the path": (
        rescoped(lambda scope: {"raw_path": scope["raw_path"].replace(b"%", b"%25")}),
        {},
        "encoded-path",
    ),
    "ignores the method": (
        rescoped(lambda scope: {} if scope["method"] == "GET" else {"method": "POST"}),
        {},
        "other-method",
    ),
    "ignores the path": (rescoped(lambda _: {"raw_path": b"/", "path": "/"}), {}, "other-path"),
    "guards requests without a key": (rescoped(without_key_guarded), {"methods": ("POST",)}, "no-key"),
    "guards GET": (None, {"methods": ("GET", "POST", "PATCH")}, "unguarded-method"),
    "accepts empty keys": (
        rekeyed(lambda keys: [key for key in keys if key not in (b"", b'""')]),
        {},
        "key-empty",
    ),
    "accepts malformed keys": (
        rekeyed(lambda keys: [re.sub(rb'(?<=.)[ "\\]|"(?=[\w-]+$)|"(?=[\w-]+"?.)', b"", key) for key in keys]),
        {},
        "key-malformed",
    ),
    "accepts two keys": (rekeyed(lambda keys: keys[:1]), {}, "key-doubled"),
    "cuts long keys": (rekeyed(lambda keys: [key[:100] for key in keys]), {}, "key-too-long"),
    "lets concurrent requests run": (race(1), {}, "concurrent slow"),
    "lets the third of concurrent requests run": (race(2, only=b"slow"), {}, "slow"),
    "stores 4xx": (None, {"outcome": lambda status: "keep" if status >= 500 else "complete"}, "rejected"),
    "replays 4xx to the same body": (repeated_rejection(), {}, "rejected"),
    "keeps the key after 4xx": (None, {"outcome": lambda status: "complete" if status < 400 else "keep"}, "rejected"),
    "releases the key after 5xx": (
        None,
        {"outcome": lambda status: "complete" if status < 400 else "release"},
        "failing",
    ),
    "ignores the body": (None, {"fingerprint": lambda _, __: b""}, "other-body"),
    "ignores the query": (rescoped(lambda _: {"query_string": b""}), {}, "other-query"),
    "has no limit for bodies": (None, {"max_body_bytes": 2 * MAX_BODY_BYTES}, "body-too-large"),
    "refuses without Retry-After": (
        refusals(409, lambda headers, *_: headers.pop(b"retry-after")),
        {},
        "in-progress-document",
    ),
    "refuses as JSON": (
        refusals(409, lambda headers, *_: headers.update({b"content-type": b"application/json; problem"})),
        {},
        "in-progress-document",
    ),
    "has a 409 of another type": (refusals(409, with_type("about:blank")), {}, "in-progress-document"),
    "has a 410 of another type": (refusals(410, with_type("about:blank")), {}, "response-not-stored-document"),
    "has a 422 of another type": (refusals(422, with_type("about:blank")), {}, "key-reused-document"),
    "has a 400 of another type": (refusals(400, with_type("about:blank")), {}, "key-invalid-document"),
    "has a 413 of another type": (refusals(413, with_type("about:blank")), {}, "body-too-large-document"),
    "has a 422 with another status member": (
        refusals(422, lambda _, members, __: members.update(status=409)),
        {},
        "key-reused-document",
    ),
    "has a 409 without title": (refusals(409, lambda _, members, __: members.pop("title")), {}, "in-progress-document"),
    "shows the key": (
        refusals(409, lambda _, members, key: members.update(detail=f"{key} is in progress")),
        {},
        "key-hidden",
    ),
    "shows the claimant": (
        refusals(409, lambda _, members, __: members.update(detail=f"{CLAIMANT} holds it")),
        {},
        "claimant-hidden",
    ),
    "has a member with the claimant": (
        refusals(409, lambda _, members, __: members.update(claimant=CLAIMANT)),
        {},
        "in-progress-document claimant-hidden",
    ),
}


def test_the_contract_is_that_of_the_vectors() -> None:
    """The constants of the checks are the defaults in the golden vectors."""
    defaults = json.loads((ROOT / "clients" / "golden" / "http.json").read_text())["defaults"]
    assert (defaults["key_header"], defaults["replayed_header"]) == (KEY_HEADER, REPLAYED_HEADER)
    assert list(STORED_HEADERS) == defaults["stored_headers"]
    assert defaults["max_body_bytes"] == MAX_BODY_BYTES


def test_each_check_names_a_section_of_the_contract() -> None:
    """The section of each check, and the type of each refusal, is a heading of the page."""
    page = (ROOT / "docs" / "client-contract.md").read_text()
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}
    assert {check.section for check in CHECKS} <= {f"{PAGE}#{heading}" for heading in headings}
    assert {refusal.heading for refusal in REFUSALS} <= headings


def test_each_check_can_fail() -> None:
    """Each check fails for at least one of the faults below, apart from those of a service without a first run."""
    certain = {name for _, _, expected in FAULTS.values() for name in expected.partition("?")[0].split()}
    assert certain | {"first-request"} == set(NAMES)


@pytest.mark.parametrize("large", [LARGE, LARGE_WITH_LOCATION])
async def test_a_correct_service_passes(large: Mapping[str, Any]) -> None:
    """Every check passes; that of 410 is skipped where the response has a Location."""
    results = await results_of(guarded(), large_body=large)
    assert list(results) == NAMES
    skipped = {"response-not-stored-document"} if large is LARGE_WITH_LOCATION else set()
    reasons = [f"{name}: {result.reason}" for name, result in results.items() if result.status is not Status.PASSED]
    assert names(results, Status.PASSED) == {*NAMES} - skipped, reasons
    assert names(results, Status.SKIPPED) == skipped


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_fails_its_check(fault: str) -> None:
    """The checks of the broken rule fail, each with a reason of one line, and no other check fails."""
    wrap, options, expected = FAULTS[fault]
    results = await results_of(guarded(wrap, **options) if wrap is not None else guarded(**options))
    certain, _, possible = expected.partition("?")
    failed = names(results, Status.FAILED)
    reasons = {name: result.reason for name, result in results.items() if result.reason}
    assert failed - {*possible.split()} == {*certain.split()}, reasons
    for name in failed:
        assert reasons[name]
        assert "\n" not in reasons[name]


async def test_a_service_without_a_first_run_fails_that_check_alone() -> None:
    """If no request succeeds, the checks that need a first response have no result."""
    results = await results_of(guarded(), body=FAILING)
    assert names(results, Status.FAILED) == {"first-request"}
    needs = {"replay", "replay-headers", "replay-mark", "set-cookie", "quoted-key", "encoded-path", "other-method"}
    more = {"other-path", "no-key", "concurrent", "rejected", "other-body", "other-query"}
    assert names(results, Status.COULD_NOT_RUN) == needs | more


@pytest.mark.parametrize(
    ("option", "check", "said"),
    [
        ("rejected_body", "rejected", "it must be 4xx"),
        ("failing_body", "failing", "it must be 5xx"),
        ("large_body", "large", "it must be larger"),
    ],
)
async def test_a_body_with_another_answer_than_expected_gives_no_result(option: str, check: str, said: str) -> None:
    """A body that does not reach the rule leaves its check without a result."""
    results = await results_of(guarded(), **{option: BODY})
    assert names(results, Status.COULD_NOT_RUN) == {check}
    assert said in results[check].reason


async def test_checks_without_their_option_are_skipped() -> None:
    """A skipped check names the option that enables it."""
    async with served(guarded()) as url, reached(Plan(base_urls=[url], route="/rewards", body=b'{"amount": 5}')) as it:
        results = {result.check.name: result async for result in run_checks(it)}
    reasons = {name: result.reason for name, result in results.items() if result.status is Status.SKIPPED}
    assert {name: reasons[name] for name in ("rejected", "failing", "slow", "large", "other-path")} == {
        "rejected": "give --rejected-body",
        "failing": "give --failing-body",
        "slow": "give --slow-body",
        "large": "give --large-body",
        "other-path": "give --other-route",
    }
    assert not names(results, Status.FAILED) | names(results, Status.COULD_NOT_RUN)


async def test_the_processes_of_a_fleet_are_compared() -> None:
    """Two guards with different stores are no fleet: each base URL receives first requests and repeats."""
    rewards = Rewards()
    one, other = guarded(rewards=rewards), guarded(rewards=rewards)
    async with served(one) as url, served(other) as other_url, reached(plan_for(url, other_url)) as subject:
        results = {result.check.name: result async for result in run_checks(subject)}
    failed = names(results, Status.FAILED)
    assert {"replay", "quoted-key", "encoded-path", "concurrent", "slow", "failing", "large", "other-body"} <= failed
