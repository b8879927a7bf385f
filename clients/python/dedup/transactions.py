"""A claimed transaction, as anybody may see it."""

import enum
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from google.protobuf.timestamp_pb2 import Timestamp

from dedup.v1 import dedup_pb2


class TransactionState(enum.Enum):
    """What has become of a claimed transaction."""

    UNSPECIFIED = 0
    IN_PROGRESS = 1
    COMPLETED = 2


_STATES = {state.value: state for state in TransactionState}


@dataclass(frozen=True, slots=True)
class Transaction:
    """A claimed transaction: who holds it, since when and until when, and its result once it is completed.

    Times are aware, in UTC. Those of a claim that this service did not write are None, and its claimant is empty.
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
        """Whether the work is done; `result` is what its holder gave."""
        return self.state is TransactionState.COMPLETED

    @classmethod
    def of(cls, message: dedup_pb2.Transaction) -> Self:
        """Return the transaction of a reply."""
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
