"""What a call needs from outside, so that its decisions are written once and know neither threads nor event loops.

The logic of this client is generators that yield steps. A driver takes each step and sends the answer back in: the
synchronous client by blocking, the asynchronous one by awaiting, a test by answering from a list.
"""

from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from dedup.errors import CallFailed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """Call `method` of the service with `request`, for at most `timeout_s` seconds; answered by its reply."""

    method: str
    request: Message
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Do nothing for so many seconds."""

    seconds: float


Steps = Generator[Send | Pause, Message | None, T]


def run(steps: Steps[T], send: Callable[[Send], Message], pause: Callable[[float], None]) -> T:
    """Take every step by blocking, and return the outcome.

    `send` raises CallFailed for whatever goes wrong with an attempt.
    """
    answer: Message | None = None
    failure: CallFailed | None = None
    try:
        while True:
            step = steps.send(answer) if failure is None else steps.throw(failure)
            answer = failure = None
            if isinstance(step, Pause):
                pause(step.seconds)
                continue
            try:
                answer = send(step)
            except CallFailed as error:
                failure = error
    except StopIteration as end:
        outcome: T = end.value
        return outcome


async def run_async(
    steps: Steps[T], send: Callable[[Send], Awaitable[Message]], pause: Callable[[float], Awaitable[None]]
) -> T:
    """Take every step by awaiting, and return the outcome; otherwise as `run`."""
    answer: Message | None = None
    failure: CallFailed | None = None
    try:
        while True:
            step = steps.send(answer) if failure is None else steps.throw(failure)
            answer = failure = None
            if isinstance(step, Pause):
                await pause(step.seconds)
                continue
            try:
                answer = await send(step)
            except CallFailed as error:
                failure = error
    except StopIteration as end:
        outcome: T = end.value
        return outcome
