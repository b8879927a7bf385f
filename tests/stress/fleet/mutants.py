"""A service in Python with one protection removed: `python -m tests.stress.fleet.mutants NAME SCRIPT`.

- `own-ids`: the transaction id has the name of the language, so that the languages do not see each other's claims.
- `releases-on-5xx`: a 5xx releases the claim, although the work may have been done.
- `releases-on-exception`: so does an exception or a cancelled request.
- `no-keep-alive`: the claim ends with its lease while the work goes on.
- `own-form`: a stored response lacks its Location.
- `other-body`: the guard reformats the body that it replays.
- `nothing-stored`: the claim is never completed, so that duplicates receive 409 for ever.
- `own-fingerprint`: the fingerprint has the name of the language, so that the languages refuse each other's requests.
"""

import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dedup import asgi, django, idempotency, wsgi
from dedup.http_profile import Outcome, Response
from dedup.idempotency import Rules

# Any: the functions to replace are imported there, not exported.
_SHARED: Any = idempotency
_GUARDS: tuple[Any, ...] = (asgi, wsgi, django)


def _own_ids() -> None:
    identity = _SHARED.identity
    _SHARED.identity = lambda caller, method, path, key: identity(f"python{caller}", method, path, key)


def _own_fingerprint() -> None:
    fingerprint = _SHARED.fingerprint
    _SHARED.fingerprint = lambda method, path, query, body: fingerprint(f"python {method}", path, query, body)


def _releases_on_5xx() -> None:
    _patch_rules(outcome=lambda status: "complete" if status < 400 else "release")


def _nothing_stored() -> None:
    _patch_rules(outcome=lambda _: "keep")


def _no_keep_alive() -> None:
    _patch_rules(keep_alive=False)


def _patch_rules(**options: Any) -> None:
    made = Rules.__init__

    def init(self: Rules, **given: Any) -> None:
        made(self, **given | options)

    Rules.__init__ = init  # type: ignore[method-assign]


def _releases_on_exception() -> None:
    end, end_async = idempotency.end, idempotency.end_async

    def otherwise(outcome: Outcome) -> Outcome:
        return "release" if outcome == "keep" else outcome

    for guard in _GUARDS:
        if hasattr(guard, "end"):
            guard.end = lambda claim, outcome, result: end(claim, otherwise(outcome), result)
        if hasattr(guard, "end_async"):
            guard.end_async = lambda claim, outcome, result: end_async(claim, otherwise(outcome), result)


def _own_form() -> None:
    _patch_stored(
        lambda response: replace(
            response, headers=tuple((name, value) for name, value in response.headers if name != "location")
        )
    )


def _other_body() -> None:
    _patch_stored(lambda response: replace(response, body=response.body + b" "))


def _patch_stored(change: Callable[[Response], Response]) -> None:
    stored = Rules.stored

    def patched(self: Rules, response: Response, *, streamed: bool) -> bytes:
        return stored(self, change(response), streamed=streamed)

    Rules.stored = patched  # type: ignore[method-assign]


MUTATIONS: dict[str, Callable[[], None]] = {
    "own-ids": _own_ids,
    "own-fingerprint": _own_fingerprint,
    "releases-on-5xx": _releases_on_5xx,
    "releases-on-exception": _releases_on_exception,
    "no-keep-alive": _no_keep_alive,
    "own-form": _own_form,
    "other-body": _other_body,
    "nothing-stored": _nothing_stored,
}


if __name__ == "__main__":
    MUTATIONS[sys.argv[1]]()
    sys.argv[:] = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
