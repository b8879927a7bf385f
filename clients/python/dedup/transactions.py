"""A claimed transaction as every caller sees it."""

import enum
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from google.protobuf.timestamp_pb2 import Timestamp

from dedup.v1 import dedup_pb2


class TransactionState(enum.Enum):
    """The state of a claimed transaction; UNSPECIFIED for one this client does not know."""

    UNSPECIFIED = 0
    IN_PROGRESS = 1
    COMPLETED = 2


_STATES = {state.value: state for state in TransactionState}


@dataclass(frozen=True, slots=True)
class Transaction:
    """A claimed transaction: its holder, its times, and its result once completed.

    Times are aware and in UTC. For a claim by another program, times are None and the claimant is empty.
    """

    transaction_id: str
    namespace: str
    state: TransactionState
    claimant: str
    claim_time: datetime | None
    expire_time: datetime | None
    completion_time: datetime | None
    result: bytes

    @property
    def completed(self) -> bool:
        """Whether the work is done and `result` is final."""
        return self.state is TransactionState.COMPLETED

    @classmethod
    def of(cls, message: dedup_pb2.Transaction) -> Self:
        """Convert the transaction of a reply."""
        return cls(
            transaction_id=message.transaction_id,
            namespace=message.namespace,
            state=_STATES.get(int(message.state), TransactionState.UNSPECIFIED),
            claimant=message.claimant,
            claim_time=_time(message.claim_time) if message.HasField("claim_time") else None,
            expire_time=_time(message.expire_time) if message.HasField("expire_time") else None,
            completion_time=_time(message.completion_time) if message.HasField("completion_time") else None,
            result=message.result,
        )


def _time(moment: Timestamp) -> datetime:
    return moment.ToDatetime(tzinfo=UTC)
