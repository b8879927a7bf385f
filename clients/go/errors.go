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
	// ErrDuplicate matches the [*DuplicateError] of a claim whose transaction somebody else holds, or completed.
	ErrDuplicate = errors.New("dedup: duplicate transaction")
	// ErrPayloadMismatch matches the [*PayloadMismatchError] of a claim whose id is known with another fingerprint.
	ErrPayloadMismatch = errors.New("dedup: the transaction is known with another payload fingerprint")
	// ErrUnavailable matches an [*Error] when the service did not answer the question: it is no duplicate, and no go.
	ErrUnavailable = errors.New("dedup: service unavailable")
	// ErrNotHeld means that the claim expired, was released, was taken by another caller or is completed already.
	// Nothing was changed.
	ErrNotHeld = errors.New("dedup: the claim is not held")
	// ErrNotFound matches an [*Error] of a look-up when nobody holds the transaction.
	ErrNotFound = errors.New("dedup: transaction not found")
)

// ReasonOutcomeUnspecified is the reason of an [*Error] when the service answered without an outcome that this client
// knows. It is the one reason that the client gives itself, and it is never a go, whatever the [Policy].
const ReasonOutcomeUnspecified = "OUTCOME_UNSPECIFIED"

// errorDomain is the domain of the service in google.rpc.ErrorInfo.
const errorDomain = "dedup.v1"

// DuplicateError says that a transaction is held by somebody else or completed; errors.Is(err, ErrDuplicate) is true.
type DuplicateError struct {
	// Transaction is that of the holder, with the result once it is completed.
	Transaction Transaction
}

// Error says in what state the transaction is; it leaves out the id, which may be personal.
func (e *DuplicateError) Error() string {
	return fmt.Sprintf("%v, %v", ErrDuplicate, e.Transaction.State)
}

// Is matches ErrDuplicate.
func (e *DuplicateError) Is(target error) bool { return target == ErrDuplicate }

// PayloadMismatchError says that an id was reused for different work; errors.Is(err, ErrPayloadMismatch) is true.
type PayloadMismatchError struct {
	// Transaction is that of the holder.
	Transaction Transaction
}

// Error says what is wrong.
func (e *PayloadMismatchError) Error() string { return ErrPayloadMismatch.Error() }

// Is matches ErrPayloadMismatch.
func (e *PayloadMismatchError) Is(target error) bool { return target == ErrPayloadMismatch }

// Applied says whether a failed call may have changed something.
type Applied string

const (
	// AppliedNo means that none of the attempts changed anything.
	AppliedNo Applied = "no"
	// AppliedUnknown means that the call may have been applied.
	AppliedUnknown Applied = "unknown"
)

// Violation is one field that breaks the contract.
type Violation struct {
	// Field is the name of the field in the contract.
	Field string
	// Description says what is wrong with it.
	Description string
}

// Error is a question that the service did not answer, after all retries. Treat it as neither a go nor a duplicate.
//
// errors.Is matches it with ErrUnavailable, with ErrNotFound, and with context.Canceled or context.DeadlineExceeded as
// its code says, but for a call that the service and not the caller cancelled, which is ErrUnavailable. errors.As and status.FromError find the gRPC status of the last attempt.
type Error struct {
	// Code is the gRPC code of the last attempt.
	Code codes.Code
	// Reason is the stable reason of the service, and empty when gRPC itself made the error.
	Reason string
	// Applied says whether any of the attempts may have been applied.
	Applied Applied
	// Message is the text of the last attempt.
	Message string
	// Attempts is how many attempts were made.
	Attempts int
	// Violations names the fields that break the contract, for codes.InvalidArgument.
	Violations []Violation

	status *status.Status
	// retryDelay is how long the service asks to wait; mendable is whether it asks for a retry at all.
	retryDelay time.Duration
	mendable   bool
	// cutOff is whether a server cancelled the call, as one does that ends, and not the caller.
	cutOff bool
}

// Error describes the last attempt.
func (e *Error) Error() string {
	reason := e.Reason
	if reason == "" {
		reason = "no reason given"
	}
	return fmt.Sprintf("dedup: %v (%s, applied: %s, attempts: %d): %s", e.Code, reason, e.Applied, e.Attempts, e.Message)
}

// Is matches the sentinel errors of this package and of package context.
func (e *Error) Is(target error) bool {
	switch target {
	case ErrUnavailable:
		return e.unavailable() || e.Reason == ReasonOutcomeUnspecified
	case ErrNotFound:
		return e.Code == codes.NotFound && e.Reason == "TRANSACTION_NOT_FOUND"
	case context.Canceled:
		return e.Code == codes.Canceled && !e.cutOff
	case context.DeadlineExceeded:
		return e.Code == codes.DeadlineExceeded
	}
	return false
}

// GRPCStatus returns the status of the last attempt, with its details.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// unavailable reports whether the service could not answer, or not in time.
func (e *Error) unavailable() bool {
	return e.Code == codes.Unavailable || e.Code == codes.DeadlineExceeded || e.Code == codes.ResourceExhausted || e.cutOff
}

// retryable reports whether another attempt may get an answer. A time-out may always: the budget of the call ends
// that. Otherwise the service says so by RetryInfo, and an error without ErrorInfo comes from gRPC, which cannot say.
func (e *Error) retryable() bool {
	return e.unavailable() && (e.Code == codes.DeadlineExceeded || e.Reason == "" || e.mendable)
}

// newError reads what the service says about an error. What says nothing may have been applied.
func newError(err error) *Error {
	s, ok := status.FromError(err)
	if !ok {
		s = status.FromContextError(err)
	}
	e := &Error{Code: s.Code(), Message: s.Message(), Applied: AppliedUnknown, status: s}
	for _, detail := range s.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.GetDomain() == errorDomain {
				e.Reason = detail.GetReason()
				if detail.GetMetadata()["applied"] == string(AppliedNo) {
					e.Applied = AppliedNo
				}
			}
		case *errdetails.RetryInfo:
			e.mendable = true
			e.retryDelay = max(0, detail.GetRetryDelay().AsDuration())
		case *errdetails.BadRequest:
			for _, v := range detail.GetFieldViolations() {
				e.Violations = append(e.Violations, Violation{Field: v.GetField(), Description: v.GetDescription()})
			}
		}
	}
	return e
}

// invalid is the error of a field that cannot even be sent.
func invalid(field, description string) *Error {
	message := field + ": " + description
	return &Error{
		Code: codes.InvalidArgument, Reason: "INVALID_REQUEST", Applied: AppliedNo, Message: message,
		Violations: []Violation{{Field: field, Description: description}},
		status:     status.New(codes.InvalidArgument, message),
	}
}

// unspecified is the error of a reply whose outcome this client does not know.
func unspecified(call string, outcome fmt.Stringer) *Error {
	message := fmt.Sprintf("the service answered %s with the outcome %v", call, outcome)
	return &Error{
		Code: codes.Unknown, Reason: ReasonOutcomeUnspecified, Applied: AppliedUnknown, Message: message,
		status: status.New(codes.Unknown, message),
	}
}
