import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClaimOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLAIM_OUTCOME_UNSPECIFIED: _ClassVar[ClaimOutcome]
    CLAIM_OUTCOME_CLAIMED: _ClassVar[ClaimOutcome]
    CLAIM_OUTCOME_DUPLICATE: _ClassVar[ClaimOutcome]
    CLAIM_OUTCOME_PAYLOAD_MISMATCH: _ClassVar[ClaimOutcome]

class CompleteOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPLETE_OUTCOME_UNSPECIFIED: _ClassVar[CompleteOutcome]
    COMPLETE_OUTCOME_COMPLETED: _ClassVar[CompleteOutcome]
    COMPLETE_OUTCOME_NOT_HELD: _ClassVar[CompleteOutcome]

class ReleaseOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RELEASE_OUTCOME_UNSPECIFIED: _ClassVar[ReleaseOutcome]
    RELEASE_OUTCOME_RELEASED: _ClassVar[ReleaseOutcome]
    RELEASE_OUTCOME_NOT_HELD: _ClassVar[ReleaseOutcome]

class ExtendOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXTEND_OUTCOME_UNSPECIFIED: _ClassVar[ExtendOutcome]
    EXTEND_OUTCOME_EXTENDED: _ClassVar[ExtendOutcome]
    EXTEND_OUTCOME_NOT_HELD: _ClassVar[ExtendOutcome]

class TransactionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSACTION_STATE_UNSPECIFIED: _ClassVar[TransactionState]
    TRANSACTION_STATE_IN_PROGRESS: _ClassVar[TransactionState]
    TRANSACTION_STATE_COMPLETED: _ClassVar[TransactionState]
CLAIM_OUTCOME_UNSPECIFIED: ClaimOutcome
CLAIM_OUTCOME_CLAIMED: ClaimOutcome
CLAIM_OUTCOME_DUPLICATE: ClaimOutcome
CLAIM_OUTCOME_PAYLOAD_MISMATCH: ClaimOutcome
COMPLETE_OUTCOME_UNSPECIFIED: CompleteOutcome
COMPLETE_OUTCOME_COMPLETED: CompleteOutcome
COMPLETE_OUTCOME_NOT_HELD: CompleteOutcome
RELEASE_OUTCOME_UNSPECIFIED: ReleaseOutcome
RELEASE_OUTCOME_RELEASED: ReleaseOutcome
RELEASE_OUTCOME_NOT_HELD: ReleaseOutcome
EXTEND_OUTCOME_UNSPECIFIED: ExtendOutcome
EXTEND_OUTCOME_EXTENDED: ExtendOutcome
EXTEND_OUTCOME_NOT_HELD: ExtendOutcome
TRANSACTION_STATE_UNSPECIFIED: TransactionState
TRANSACTION_STATE_IN_PROGRESS: TransactionState
TRANSACTION_STATE_COMPLETED: TransactionState

class Transaction(_message.Message):
    __slots__ = ("transaction_id", "namespace", "state", "claimant", "claim_time", "expire_time", "completion_time", "result")
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CLAIMANT_FIELD_NUMBER: _ClassVar[int]
    CLAIM_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TIME_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    transaction_id: str
    namespace: str
    state: TransactionState
    claimant: str
    claim_time: _timestamp_pb2.Timestamp
    expire_time: _timestamp_pb2.Timestamp
    completion_time: _timestamp_pb2.Timestamp
    result: bytes
    def __init__(self, transaction_id: _Optional[str] = ..., namespace: _Optional[str] = ..., state: _Optional[_Union[TransactionState, str]] = ..., claimant: _Optional[str] = ..., claim_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., completion_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., result: _Optional[bytes] = ...) -> None: ...

class ClaimTransactionRequest(_message.Message):
    __slots__ = ("transaction_id", "namespace", "ttl", "expire_time", "claim_token", "claimant", "payload_fingerprint", "wait")
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    CLAIM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CLAIMANT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    transaction_id: str
    namespace: str
    ttl: _duration_pb2.Duration
    expire_time: _timestamp_pb2.Timestamp
    claim_token: str
    claimant: str
    payload_fingerprint: bytes
    wait: _duration_pb2.Duration
    def __init__(self, transaction_id: _Optional[str] = ..., namespace: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., claim_token: _Optional[str] = ..., claimant: _Optional[str] = ..., payload_fingerprint: _Optional[bytes] = ..., wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ClaimTransactionResponse(_message.Message):
    __slots__ = ("outcome", "claim_token", "replayed", "shadow_duplicate", "transaction")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CLAIM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    SHADOW_DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    outcome: ClaimOutcome
    claim_token: str
    replayed: bool
    shadow_duplicate: bool
    transaction: Transaction
    def __init__(self, outcome: _Optional[_Union[ClaimOutcome, str]] = ..., claim_token: _Optional[str] = ..., replayed: bool = ..., shadow_duplicate: bool = ..., transaction: _Optional[_Union[Transaction, _Mapping]] = ...) -> None: ...

class CompleteTransactionRequest(_message.Message):
    __slots__ = ("transaction_id", "namespace", "claim_token", "result", "ttl", "expire_time")
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    CLAIM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    transaction_id: str
    namespace: str
    claim_token: str
    result: bytes
    ttl: _duration_pb2.Duration
    expire_time: _timestamp_pb2.Timestamp
    def __init__(self, transaction_id: _Optional[str] = ..., namespace: _Optional[str] = ..., claim_token: _Optional[str] = ..., result: _Optional[bytes] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class CompleteTransactionResponse(_message.Message):
    __slots__ = ("outcome", "transaction")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    outcome: CompleteOutcome
    transaction: Transaction
    def __init__(self, outcome: _Optional[_Union[CompleteOutcome, str]] = ..., transaction: _Optional[_Union[Transaction, _Mapping]] = ...) -> None: ...

class ReleaseTransactionRequest(_message.Message):
    __slots__ = ("transaction_id", "namespace", "claim_token")
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    CLAIM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    transaction_id: str
    namespace: str
    claim_token: str
    def __init__(self, transaction_id: _Optional[str] = ..., namespace: _Optional[str] = ..., claim_token: _Optional[str] = ...) -> None: ...

class ReleaseTransactionResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: ReleaseOutcome
    def __init__(self, outcome: _Optional[_Union[ReleaseOutcome, str]] = ...) -> None: ...

class ExtendTransactionRequest(_message.Message):
    __slots__ = ("transaction_id", "namespace", "claim_token", "ttl", "expire_time", "allow_shortening")
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    CLAIM_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    EXPIRE_TIME_FIELD_NUMBER: _ClassVar[int]
    ALLOW_SHORTENING_FIELD_NUMBER: _ClassVar[int]
    transaction_id: str
    namespace: str
    claim_token: str
    ttl: _duration_pb2.Duration
    expire_time: _timestamp_pb2.Timestamp
    allow_shortening: bool
    def __init__(self, transaction_id: _Optional[str] = ..., namespace: _Optional[str] = ..., claim_token: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., expire_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., allow_shortening: bool = ...) -> None: ...

class ExtendTransactionResponse(_message.Message):
    __slots__ = ("outcome", "transaction")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    outcome: ExtendOutcome
    transaction: Transaction
    def __init__(self, outcome: _Optional[_Union[ExtendOutcome, str]] = ..., transaction: _Optional[_Union[Transaction, _Mapping]] = ...) -> None: ...

class GetTransactionRequest(_message.Message):
    __slots__ = ("transaction_id", "namespace")
    TRANSACTION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    transaction_id: str
    namespace: str
    def __init__(self, transaction_id: _Optional[str] = ..., namespace: _Optional[str] = ...) -> None: ...

class GetTransactionResponse(_message.Message):
    __slots__ = ("transaction",)
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    transaction: Transaction
    def __init__(self, transaction: _Optional[_Union[Transaction, _Mapping]] = ...) -> None: ...

class BatchClaimTransactionsRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[ClaimTransactionRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[ClaimTransactionRequest, _Mapping]]] = ...) -> None: ...

class BatchClaimTransactionsResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[BatchClaimEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[BatchClaimEntry, _Mapping]]] = ...) -> None: ...

class BatchClaimEntry(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: ClaimTransactionResponse
    error: _status_pb2.Status
    def __init__(self, response: _Optional[_Union[ClaimTransactionResponse, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...
