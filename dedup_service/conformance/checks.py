"""The checks, in the order in which they run. Each plays one rule of the contract."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from dedup_service.conformance.contract import (
    BODY_TOO_LARGE,
    IN_PROGRESS,
    KEY_INVALID,
    KEY_REUSED,
    NOT_STORED,
    PAGE,
    REPLAYED_HEADER,
    STORED_HEADERS,
    Refusal,
    document_faults,
    is_replay,
    refusal_of,
)
from dedup_service.conformance.exchange import Response
from dedup_service.conformance.subject import (
    NOT_REACHABLE,
    CouldNotRun,
    Failed,
    Skipped,
    Subject,
    changed,
    described,
    expect_another_transaction,
    expect_replay,
    ran,
    together,
)

CONCURRENT = 10
PROBE_S = 0.1
# Longer than a transaction id with any key.
TOO_LONG = 600
_LETTER = re.compile(r"(?<!%)(?<!%[0-9A-Fa-f])[A-Za-z]")

T = TypeVar("T")
Run = Callable[[Subject], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Check:
    """A rule of the contract, and how to play it. `run` raises Failed, Skipped, CouldNotRun or NoAnswer."""

    name: str
    rule: str
    heading: str
    run: Run

    @property
    def section(self) -> str:
        """The address of its section of the contract."""
        return f"{PAGE}#{self.heading}"


CHECKS: list[Check] = []


def check(name: str, rule: str, heading: str) -> Callable[[Run], Run]:
    """Add the decorated function to the checks."""

    def add(run: Run) -> Run:
        CHECKS.append(Check(name, rule, heading, run))
        return run

    return add


@check("first-request", "the first request runs", "http-guards")
async def _(subject: Subject) -> None:
    response = await subject.post(subject.plan.body, subject.new_key())
    if not ran(response):
        raise Failed(f"{described(response)} to --body; it must be 2xx or 3xx")


@check("replay", "a repeat receives the first status and body", "stored-response")
async def _(subject: Subject) -> None:
    processes = len(subject.fleet.base_urls)
    for process in range(processes):
        subject.fleet.start_at(process)
        key, first = await subject.run_first()
        # One repeat for each process, the one that ran the work included.
        for _repeat in range(processes):
            repeat = await subject.post(subject.plan.body, key)
            expect_replay(first, repeat)
            subject.replays.append((first, repeat))


@check("replay-headers", "a replay has the stored headers", "stored-response")
async def _(subject: Subject) -> None:
    for first, repeat in _replays(subject):
        for name in STORED_HEADERS:
            if repeat.values(name) != first.values(name):
                values = ", ".join(repeat.values(name)) or "missing"
                raise Failed(f"{repeat.base_url}: {name} is {values}, not {', '.join(first.values(name)) or 'missing'}")


@check("replay-mark", "a replay has Idempotency-Replayed: true", "stored-response")
async def _(subject: Subject) -> None:
    for _first, repeat in _replays(subject):
        if not is_replay(repeat):
            values = ", ".join(repeat.values(REPLAYED_HEADER)) or "missing"
            raise Failed(f"{repeat.base_url}: {REPLAYED_HEADER} is {values}, not true")


@check("set-cookie", "a replay does not have the first Set-Cookie", "stored-response")
async def _(subject: Subject) -> None:
    pairs = [(first.values("set-cookie"), repeat) for first, repeat in _replays(subject)]
    if not any(cookies for cookies, _ in pairs):
        raise Skipped("no first response has a Set-Cookie")
    for cookies, repeat in pairs:
        if set(cookies) & set(repeat.values("set-cookie")):
            raise Failed(f"{repeat.base_url} replays the Set-Cookie of the first response")


@check("quoted-key", 'the keys k and "k" are equal', "identity")
async def _(subject: Subject) -> None:
    for first_form, repeat_form in (("{}", '"{}"'), ('"{}"', "{}")):
        key = subject.new_key()
        first = await subject.post(subject.plan.body, first_form.format(key))
        if refusal_of(first) is KEY_INVALID:
            raise Failed(f"{described(first)} to the key {first_form.format('k')}")
        if not ran(first):
            raise CouldNotRun(f"{described(first)} to the first request; it must be 2xx or 3xx")
        expect_replay(first, await subject.post(subject.plan.body, repeat_form.format(key)))


@check("encoded-path", "a percent-encoded path is equal to the plain one", "identity")
async def _(subject: Subject) -> None:
    path, mark, query = subject.plan.route.partition("?")
    encoded = _LETTER.sub(lambda letter: f"%{ord(letter[0]):02X}", path, count=1)
    if encoded == path:
        raise Skipped("the path of --route has no letter to encode")
    key, first = await subject.run_first()
    expect_replay(first, await subject.post(subject.plan.body, key, target=encoded + mark + query))


@check("other-method", "another method is another transaction", "identity")
async def _(subject: Subject) -> None:
    key, _first = await subject.run_first()
    response = await subject.post(subject.plan.body, key, method="PATCH")
    expect_another_transaction(response, f"PATCH {subject.plan.route}")


@check("other-path", "another path is another transaction", "identity")
async def _(subject: Subject) -> None:
    route = _given(subject.plan.other_route, "--other-route")
    key, _first = await subject.run_first()
    expect_another_transaction(await subject.post(subject.plan.body, key, target=route), f"POST {route}")


@check("no-key", "a request without a key is not guarded, or refused where a key is required", "identity")
async def _(subject: Subject) -> None:
    for _time in range(2):
        response = await subject.post(subject.plan.body)
        if refusal_of(response) is KEY_INVALID:
            subject.expect_refusal(response, KEY_INVALID, "")
        elif response.status >= 500:
            raise CouldNotRun(f"{described(response)} to a request without a key")
        elif not ran(response):
            raise Failed(f"{described(response)} to a request without a key")


@check("unguarded-method", "GET is not guarded", "identity")
async def _(subject: Subject) -> None:
    key = subject.new_key()
    for value in (key, key, f"{key} invalid"):
        response = await subject.fleet.send("GET", subject.plan.route, None, [("Idempotency-Key", value)])
        if is_replay(response) or refusal_of(response) is not None:
            raise Failed(f"{described(response)} to GET {subject.plan.route}")
        if response.status in NOT_REACHABLE:
            raise Skipped(f"not reachable: {described(response)} to GET {subject.plan.route}")


@check("key-empty", "an empty key is refused", "identity")
async def _(subject: Subject) -> None:
    for value in ("", '""'):
        subject.expect_refusal(await subject.post(subject.plan.body, value), KEY_INVALID, "")


@check("key-malformed", "an invalid key is refused", "identity")
async def _(subject: Subject) -> None:
    for form in ("{} a", '"{}', '{}"', '"{}"a', '"{}\\a"'):
        key = subject.new_key()
        subject.expect_refusal(await subject.post(subject.plan.body, form.format(key)), KEY_INVALID, key)


@check("key-doubled", "two key headers are refused", "identity")
async def _(subject: Subject) -> None:
    key = subject.new_key()
    for keys in ((key, key), (key, subject.new_key())):
        subject.expect_refusal(await subject.post(subject.plan.body, *keys), KEY_INVALID, key)


@check("key-too-long", "a key that makes the transaction id too long is refused", "identity")
async def _(subject: Subject) -> None:
    key = subject.new_key().ljust(TOO_LONG, "x")
    subject.expect_refusal(await subject.post(subject.plan.body, key), KEY_INVALID, key)


@check("concurrent", "of concurrent requests one runs, and the others receive 409 or the replay", "in-progress")
async def _(subject: Subject) -> None:
    key = subject.new_key()
    responses = await together([subject.post(subject.plan.body, key) for _ in range(CONCURRENT)])
    runs = [response for response in responses if ran(response)]
    if not runs:
        raise CouldNotRun(f"{described(responses[0])} to the first of {CONCURRENT} requests; one must be 2xx or 3xx")
    if len(runs) > 1:
        raise Failed(f"{len(runs)} of {CONCURRENT} concurrent requests ran")
    for response in responses:
        if is_replay(response):
            expect_replay(runs[0], response)
        elif response is not runs[0]:
            subject.expect_refusal(response, IN_PROGRESS, key)


@check("slow", "while the first request runs, each repeat receives 409", "in-progress")
async def _(subject: Subject) -> None:
    body = _given(subject.plan.slow_body, "--slow-body")
    key = subject.new_key()
    # Either of the two may be the first to arrive.
    requests = [asyncio.ensure_future(subject.post(body, key)) for _ in range(2)]
    try:
        await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)
        probes: list[Response] = []
        while not all(request.done() for request in requests):
            probes.append(await subject.post(body, key))
            if not is_replay(probes[-1]):
                subject.expect_refusal(probes[-1], IN_PROGRESS, key)
            await asyncio.sleep(PROBE_S)
        pair = [request.result() for request in requests]
    finally:
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
    runs = [response for response in pair if ran(response)]
    if len(runs) == len(pair):
        raise Failed("both of two concurrent requests ran")
    if not runs:
        raise CouldNotRun(f"{described(pair[0])} and {described(pair[1])} to --slow-body; one must be 2xx or 3xx")
    if all(is_replay(response) for response in (*pair, *probes) if response is not runs[0]):
        raise CouldNotRun("--slow-body ended before a repeat was answered, or the guard lets repeats wait")
    for response in pair:
        if response is not runs[0] and not is_replay(response):
            subject.expect_refusal(response, IN_PROGRESS, key)
    expect_replay(runs[0], await subject.post(body, key))


@check("rejected", "a 4xx releases the key, and the corrected body runs", "status-of-the-response")
async def _(subject: Subject) -> None:
    body = _given(subject.plan.rejected_body, "--rejected-body")
    key = subject.new_key()
    first = await subject.post(body, key)
    if not 400 <= first.status < 500 or refusal_of(first) is not None:
        raise CouldNotRun(f"{described(first)} to --rejected-body; it must be 4xx")
    repeat = await subject.post(body, key)
    if is_replay(repeat) or refusal_of(repeat) is not None:
        raise Failed(f"{described(repeat)} to a repeat of --rejected-body; it must run again")
    corrected = await subject.post(subject.plan.body, key)
    if is_replay(corrected) or refusal_of(corrected) is not None:
        raise Failed(f"{described(corrected)} to --body after a 4xx; it must run")
    if not ran(corrected):
        raise CouldNotRun(f"{described(corrected)} to --body; it must be 2xx or 3xx")


@check("failing", "a 5xx keeps the key, and a repeat receives 409", "status-of-the-response")
async def _(subject: Subject) -> None:
    body = _given(subject.plan.failing_body, "--failing-body")
    key = subject.new_key()
    first = await subject.post(body, key)
    if first.status < 500:
        raise CouldNotRun(f"{described(first)} to --failing-body; it must be 5xx")
    subject.expect_refusal(await subject.post(body, key), IN_PROGRESS, key)


@check("large", "a response that is not stored is answered with 410, or 303 to its Location", "response-not-stored")
async def _(subject: Subject) -> None:
    body = _given(subject.plan.large_body, "--large-body")
    key, first = await subject.run_first(body)
    repeat = await subject.post(body, key)
    if is_replay(repeat) and (repeat.status, repeat.body) == (first.status, first.body):
        raise CouldNotRun("the response to --large-body is stored; it must be larger")
    if repeat.status == 303:
        if not repeat.values("location") or repeat.values("location") != first.values("location"):
            raise Failed(f"{described(repeat)} with another Location than the first response")
    else:
        subject.expect_refusal(repeat, NOT_STORED, key)
        if first.values("location"):
            raise Failed(f"{described(repeat)}; the first response has a Location, so it must be 303")
    if repeat.values(REPLAYED_HEADER) != ["true"]:
        raise Failed(f"{described(repeat)} without {REPLAYED_HEADER}: true")


@check("other-body", "a used key with another body is refused", "key-reused")
async def _(subject: Subject) -> None:
    body = _given(subject.plan.other_body or changed(subject.plan.body), "--other-body")
    key, _first = await subject.run_first()
    subject.expect_refusal(await subject.post(body, key), KEY_REUSED, key)


@check("other-query", "a used key with another query is refused", "key-reused")
async def _(subject: Subject) -> None:
    route = subject.plan.route
    key, _first = await subject.run_first()
    other = f"{route}{'&' if '?' in route else '?'}conformance=1"
    subject.expect_refusal(await subject.post(subject.plan.body, key, target=other), KEY_REUSED, key)


@check("body-too-large", "a guarded body over the limit is refused", "body-too-large")
async def _(subject: Subject) -> None:
    key = subject.new_key()
    body = b'{"conformance": "%s"}' % (b"x" * subject.plan.max_body_bytes)
    subject.expect_refusal(await subject.post(body, key), BODY_TOO_LARGE, key)


def _document_check(refusal: Refusal) -> None:
    @check(f"{refusal.heading}-document", f"a {refusal.status} is the problem document", "refusals")
    async def _(subject: Subject) -> None:
        seen = [response for response, expected, _ in subject.refusals if expected is refusal]
        if not seen:
            raise Skipped(f"no request was refused with {refusal.status} {refusal.heading}")
        for response in seen:
            if faults := list(document_faults(response, refusal)):
                raise Failed(f"{response.base_url}: {'; '.join(faults)}")


for _refusal in (IN_PROGRESS, NOT_STORED, KEY_REUSED, KEY_INVALID, BODY_TOO_LARGE):
    _document_check(_refusal)


@check("key-hidden", "no refusal shows the key or the transaction id", "refusals")
async def _(subject: Subject) -> None:
    _expect_hidden(subject, [(response, key) for response, _, key in subject.refusals if key])


@check("claimant-hidden", "no refusal shows the claimant", "refusals")
async def _(subject: Subject) -> None:
    claimant = _given(subject.plan.claimant or None, "--claimant")
    _expect_hidden(subject, [(response, claimant) for response, _, _ in subject.refusals])


def _expect_hidden(subject: Subject, secrets: list[tuple[Response, str]]) -> None:
    if not subject.refusals:
        raise Skipped("no request was refused")
    for response, secret in secrets:
        shown = (response.body, *(value.encode("latin-1") for _, value in response.headers))
        if any(secret.encode() in part for part in shown):
            raise Failed(f"{described(response)} and shows it")


def _replays(subject: Subject) -> list[tuple[Response, Response]]:
    if not subject.replays:
        raise CouldNotRun("no repeat was replayed")
    return subject.replays


def _given(value: T | None, option: str) -> T:
    if value is None:
        raise Skipped(f"give {option}")
    return value
