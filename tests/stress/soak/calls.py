"""The calls of one caller: retried while their effect is unknown, with every answer checked."""

import asyncio
import random
from collections import Counter
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from dedup.v1 import dedup_pb2, dedup_pb2_grpc

TTL_MS = 30_000
DEADLINE_S = 5.0
# Outlasts every Redis restart; each attempt ends by its own deadline.
_TRIES = 60
_PAUSE_S = 0.1
DOUBT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
_MAX_WRONG = 20


class Tally:
    """Counts of the answers and scenarios of all callers, and the wrong answers."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.scenarios: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.tries = 0

    def add_wrong(self, sentence: str) -> None:
        """Count a wrong answer, and keep the first few sentences."""
        self.answers["wrong"] += 1
        if len(self.wrong) < _MAX_WRONG:
            self.wrong.append(sentence)


class Doubt(Exception):
    """The service was unavailable for longer than any Redis restart."""


class Caller:
    """Makes the calls of one scenario over a channel. The seed decides its choices."""

    def __init__(self, channel: grpc.aio.Channel, tally: Tally, rng: random.Random) -> None:
        self._stub: Any = dedup_pb2_grpc.DedupServiceStub(channel)
        self._tally = tally
        self.rng = rng
        self.doubted = False
        """Whether a call was retried, so that its outcome may be that of a repetition."""

    def new_id(self) -> str:
        """Return an unused id or token."""
        return f"soak-{self.rng.getrandbits(96):024x}"

    async def claim(self, transaction_id: str, token: str = "", *, wait_ms: int = 0, fingerprint: bytes = b"") -> Any:
        """Claim, and return the reply."""
        request = dedup_pb2.ClaimTransactionRequest(
            transaction_id=transaction_id,
            claim_token=token or self.new_id(),
            claimant=token,
            payload_fingerprint=fingerprint,
            ttl=of_ms(TTL_MS),
            wait=of_ms(wait_ms),
        )
        return await self.ask("ClaimTransaction", request)

    async def hold(self, method: str, transaction_id: str, token: str, **fields: Any) -> Any:
        """Complete, release or extend, and return the reply."""
        request = getattr(dedup_pb2, f"{method}Request")(transaction_id=transaction_id, claim_token=token, **fields)
        return await self.ask(method, request)

    async def ask(self, method: str, request: Any) -> Any:
        """Return the reply to a valid request, with retries. Raises Doubt when they are used up."""
        for number in range(_TRIES):
            self._tally.tries += 1
            self.doubted |= number > 0
            try:
                reply = await getattr(self._stub, method)(request, timeout=DEADLINE_S)
            except grpc.aio.AioRpcError as error:
                self.count(error.code().name)
                if error.code() not in DOUBT:
                    raise
            else:
                self.count(outcome_of(reply))
                return reply
            await asyncio.sleep(_PAUSE_S)
        raise Doubt(f"{method} failed {_TRIES} times with unknown effect")

    async def rejected(self, method: str, request: Any) -> grpc.StatusCode:
        """Return the error code of an invalid request, with retries; OK if it is answered."""
        try:
            await self.ask(method, request)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def try_once(self, request: Any, *, deadline_s: float = DEADLINE_S, cancel_after_s: float = 60) -> None:
        """Claim once, and give up early by a cancel or a deadline. Any outcome is right."""
        self._tally.tries += 1
        call = self._stub.ClaimTransaction(request, timeout=deadline_s)
        handle = asyncio.get_running_loop().call_later(cancel_after_s, call.cancel)
        try:
            self.count(outcome_of(await call))
        except asyncio.CancelledError:
            self.count("cancelled by the caller")
            if not call.cancelled():
                raise
        except grpc.aio.AioRpcError as error:
            self.count(error.code().name)
            if error.code() not in DOUBT:
                raise
        finally:
            handle.cancel()

    def expect(self, found: object, wanted: object, subject: str) -> None:
        """Count a wrong answer unless `found` equals `wanted`."""
        if found != wanted:
            self._tally.add_wrong(f"{subject}: expected {wanted}, got {found}")

    def count(self, answer: str) -> None:
        """Count an answer."""
        self._tally.answers[answer] += 1


def of_ms(milliseconds: int) -> Duration:
    """Return a protobuf duration."""
    duration = Duration()
    duration.FromMilliseconds(milliseconds)
    return duration


def outcome_of(reply: Any) -> str:
    """Return the outcome name of a reply, or OK if it has none."""
    field = reply.DESCRIPTOR.fields_by_name.get("outcome")
    if field is None:
        return "OK"
    name: str = field.enum_type.values_by_number[reply.outcome].name
    return name.partition("_OUTCOME_")[2]
