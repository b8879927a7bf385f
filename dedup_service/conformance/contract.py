"""The rules of the client contract on keys, headers and refusals, and their comparison with a response."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from dedup_service.conformance.exchange import Response

PAGE = "https://github.com/dedup-service/dedup-service/blob/main/docs/client-contract.md"
KEY_HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotency-Replayed"
STORED_HEADERS = ("content-encoding", "content-language", "content-type", "etag", "link", "location", "retry-after")
MAX_BODY_BYTES = 1024 * 1024
PROBLEM_TYPE = "application/problem+json"
PROBLEM_MEMBERS = frozenset({"type", "title", "status", "detail"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row of the contract's table of refusals."""

    heading: str
    status: int
    retry_after: bool = False

    @property
    def type(self) -> str:
        """The type of its problem document."""
        return f"{PAGE}#{self.heading}"


IN_PROGRESS = Refusal("in-progress", 409, retry_after=True)
NOT_STORED = Refusal("response-not-stored", 410)
KEY_REUSED = Refusal("key-reused", 422)
KEY_INVALID = Refusal("key-invalid", 400)
BODY_TOO_LARGE = Refusal("body-too-large", 413)
UNAVAILABLE = Refusal("unavailable", 503, retry_after=True)
REFUSALS = (IN_PROGRESS, NOT_STORED, KEY_REUSED, KEY_INVALID, BODY_TOO_LARGE, UNAVAILABLE)


def is_replay(response: Response) -> bool:
    """Return whether a response is marked as a replay."""
    return response.values(REPLAYED_HEADER) == ["true"]


def refusal_of(response: Response) -> Refusal | None:
    """Return which refusal of a guard a response is, None if it is the service's own response."""
    stated = _members(response).get("type")
    return next((refusal for refusal in REFUSALS if refusal.type == stated), None)


def document_faults(response: Response, refusal: Refusal) -> Iterator[str]:
    """Yield in what the response differs from the problem document of `refusal`."""
    content_types = response.values("content-type")
    if [value.partition(";")[0].strip().lower() for value in content_types] != [PROBLEM_TYPE]:
        yield f"Content-Type is {', '.join(content_types) or 'missing'}, not {PROBLEM_TYPE}"
    if refusal.retry_after and response.values("retry-after") != ["1"]:
        yield f"Retry-After is {', '.join(response.values('retry-after')) or 'missing'}, not 1"
    members = _members(response)
    if not members:
        yield "the body is not a JSON object"
        return
    if members.get("type") != refusal.type:
        yield f"type is {members.get('type')!r}, not {refusal.type!r}"
    if members.get("status") != refusal.status:
        yield f"the member status is {members.get('status')!r}, not {refusal.status}"
    for name in ("title", "detail"):
        if not isinstance(members.get(name), str):
            yield f"the member {name} is missing"
    if more := sorted(members.keys() - PROBLEM_MEMBERS):
        yield f"the contract does not have the members {', '.join(more)}"


def _members(response: Response) -> dict[str, object]:
    try:
        parsed = json.loads(response.body)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
