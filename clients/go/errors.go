package dedup

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var (
	// ErrDuplicate matches a [*DuplicateError].
	ErrDuplicate = errors.New("dedup: duplicate transaction")
	// ErrPayloadMismatch matches a [*PayloadMismatchError].
	ErrPayloadMismatch = errors.New("dedup: the transaction was claimed with a different payload fingerprint")
	// ErrUnavailable matches an [*Error] without an answer from the service. Do not start the work, and do not report a
	// duplicate.
	ErrUnavailable = errors.New("dedup: service unavailable")
	// ErrNotHeld means that the claim expired, or was released, completed or taken by another caller. Nothing changed.
	ErrNotHeld = errors.New("dedup: the claim is not held")
	// ErrClaimLost is the cause of a context of [Claim.KeepAlive] whose claim was lost: another caller may get it.
	ErrClaimLost = errors.New("dedup: the claim was lost")
	// ErrResultNotStored means that the transaction is completed, but without its result, which is too large.
	ErrResultNotStored = errors.New("dedup: completed without the result")
	// ErrClosed matches the [*Error] of a call after Close, or of one that was in flight. It does not match
	// ErrUnavailable, so no [Policy] grants such a claim.
	ErrClosed = errors.New("dedup: the client is closed")
	// ErrNotFound matches the [*Error] of a Get of an unclaimed transaction.
	ErrNotFound = errors.New("dedup: transaction not found")
)

// ReasonOutcomeUnspecified is this client's reason for a reply with an unknown outcome. No [Policy] grants such a
// claim.
const ReasonOutcomeUnspecified = "OUTCOME_UNSPECIFIED"

// errorDomain is the service's domain in google.rpc.ErrorInfo.
const errorDomain = "dedup.v1"

// DuplicateError reports a transaction that another caller holds or completed. It matches [ErrDuplicate].
type DuplicateError struct {
	// Transaction is the holder's, with the result once completed.
	Transaction Transaction
}

// Error returns the transaction's state without its id, which may identify a user.
func (e *DuplicateError) Error() string {
	return fmt.Sprintf("%v, %v", ErrDuplicate, e.Transaction.State)
}

// Is matches ErrDuplicate.
func (e *DuplicateError) Is(target error) bool { return target == ErrDuplicate }

// PayloadMismatchError reports an id that was reused for different work. It matches [ErrPayloadMismatch].
type PayloadMismatchError struct {
	// Transaction is the holder's.
	Transaction Transaction
}

// Error returns the text of [ErrPayloadMismatch].
func (e *PayloadMismatchError) Error() string { return ErrPayloadMismatch.Error() }

// Is matches ErrPayloadMismatch.
func (e *PayloadMismatchError) Is(target error) bool { return target == ErrPayloadMismatch }

// Applied reports whether a failed call may have changed anything.
type Applied string

const (
	// AppliedNo means that no attempt changed anything.
	AppliedNo Applied = "no"
	// AppliedUnknown means that an attempt may have been applied.
	AppliedUnknown Applied = "unknown"
)

type Violation struct {
	// Field is its name in the contract.
	Field string
	// Description explains why it is invalid.
	Description string
}

// Error is a failed call, after all retries. It neither grants the claim nor reports a duplicate.
//
// It matches ErrUnavailable, ErrClosed, ErrNotFound, context.Canceled and context.DeadlineExceeded. A call cancelled by
// the service matches ErrUnavailable, and one cancelled by Close ErrClosed, not context.Canceled. status.FromError
// returns the gRPC status of the last attempt. For the correlation id see [WithDialOptions].
type Error struct {
	// Code is the gRPC code of the last attempt.
	Code codes.Code
	// Reason is the service's stable reason. It is empty if gRPC itself made the error.
	Reason string
	// Applied reports whether any attempt may have been applied.
	Applied Applied
	// Message is the error text of the last attempt.
	Message string
	// Attempts is the number of attempts.
	Attempts int
	// Violations lists the invalid fields, for codes.InvalidArgument.
	Violations []Violation

	status *status.Status
	// retryDelay is the pause of the service's RetryInfo; retryInfo reports whether it has one.
	retryDelay time.Duration
	retryInfo  bool
	// cutOff reports that the server cancelled the call, as during its shutdown.
	cutOff bool
	// closed reports that the client was closed.
	closed bool
}

// Error returns a text about the last attempt, without transaction id and token.
func (e *Error) Error() string {
	reason := e.Reason
	if reason == "" {
		reason = "no reason given"
	}
	return fmt.Sprintf("dedup: %v (%s, applied: %s, attempts: %d): %s", e.Code, reason, e.Applied, e.Attempts, e.Message)
}

// Is matches ErrUnavailable, ErrClosed, ErrNotFound, context.Canceled and context.DeadlineExceeded.
func (e *Error) Is(target error) bool {
	switch target {
	case ErrUnavailable:
		return e.unavailable() || e.Reason == ReasonOutcomeUnspecified
	case ErrClosed:
		return e.closed
	case ErrNotFound:
		return e.Code == codes.NotFound && e.Reason == "TRANSACTION_NOT_FOUND"
	case context.Canceled:
		return e.Code == codes.Canceled && !e.cutOff && !e.closed
	case context.DeadlineExceeded:
		return e.Code == codes.DeadlineExceeded
	}
	return false
}

// GRPCStatus returns the status of the last attempt, with its details.
func (e *Error) GRPCStatus() *status.Status { return e.status }

func (e *Error) unavailable() bool {
	return e.Code == codes.Unavailable || e.Code == codes.DeadlineExceeded || e.Code == codes.ResourceExhausted || e.cutOff
}

// retryable reports whether another attempt may succeed: after a timeout, an error of gRPC itself (without ErrorInfo)
// or one of the service with RetryInfo.
func (e *Error) retryable() bool {
	return e.unavailable() && (e.Code == codes.DeadlineExceeded || e.Reason == "" || e.retryInfo)
}

// newError reads the details of a gRPC error. Without ErrorInfo a call that was sent may have been applied.
func newError(err error) *Error {
	applied := AppliedUnknown
	var unsent *unsentError
	var doubtful *doubtfulError
	inDoubt := errors.As(err, &doubtful)
	if inDoubt {
		err = doubtful.cause
	}
	if errors.As(err, &unsent) {
		err = unsent.cause
		if !inDoubt {
			applied = AppliedNo
		}
	}
	s, ok := status.FromError(err)
	if !ok {
		s = status.FromContextError(err)
	}
	e := &Error{Code: s.Code(), Message: s.Message(), Applied: applied, status: s}
	for _, detail := range s.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.GetDomain() == errorDomain {
				e.Reason = detail.GetReason()
				if detail.GetMetadata()["applied"] == string(AppliedNo) && !inDoubt {
					e.Applied = AppliedNo
				}
			}
		case *errdetails.RetryInfo:
			e.retryInfo = true
			e.retryDelay = max(0, detail.GetRetryDelay().AsDuration())
		case *errdetails.BadRequest:
			for _, v := range detail.GetFieldViolations() {
				e.Violations = append(e.Violations, Violation{Field: v.GetField(), Description: v.GetDescription()})
			}
		}
	}
	return e
}

// closedError returns the error of a call after Close.
func closedError() *Error {
	message := "the client is closed: create another one"
	return &Error{
		Code: codes.Canceled, Applied: AppliedNo, Message: message, closed: true,
		status: status.New(codes.Canceled, message),
	}
}

func invalid(field, description string) *Error {
	message := field + ": " + description
	return &Error{
		Code: codes.InvalidArgument, Reason: "INVALID_REQUEST", Applied: AppliedNo, Message: message,
		Violations: []Violation{{Field: field, Description: description}},
		status:     status.New(codes.InvalidArgument, message),
	}
}

// unspecified returns the error for an unknown outcome.
func unspecified(call string, outcome fmt.Stringer) *Error {
	message := fmt.Sprintf("the service answered %s with the unknown outcome %v", call, outcome)
	return &Error{
		Code: codes.Unknown, Reason: ReasonOutcomeUnspecified, Applied: AppliedUnknown, Message: message,
		status: status.New(codes.Unknown, message),
	}
}
