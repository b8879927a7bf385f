package deduptest

import (
	"crypto/rand"
	"regexp"
	"strings"
	"time"
	"unicode"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// named is any request: all name a transaction.
type named interface {
	GetTransactionId() string
	GetNamespace() string
}

// holder is a request that requires the claim token.
type holder interface {
	named
	GetClaimToken() string
}

var (
	namespacePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9_.-]{0,62}$`)
	tokenPattern     = regexp.MustCompile(`^[ -~]{16,64}$`)
)

func namespaceOf(r named) string {
	if r.GetNamespace() == "" {
		return "default"
	}
	return r.GetNamespace()
}

func newToken() string { return rand.Text() }

func checkName(r named) error {
	switch id := r.GetTransactionId(); {
	case id == "" || len(id) > 512 || strings.ContainsFunc(id, unicode.IsControl):
		return errInvalid("transaction_id", "must be 1 to 512 bytes of UTF-8 without control characters")
	case !namespacePattern.MatchString(namespaceOf(r)):
		return errInvalid("namespace", "must match "+namespacePattern.String())
	}
	return nil
}

func checkHolder(r holder) error {
	if err := checkName(r); err != nil {
		return err
	}
	if !tokenPattern.MatchString(r.GetClaimToken()) {
		return errInvalid("claim_token", "must be 16 to 64 printable ASCII characters")
	}
	return nil
}

func checkClaim(r *dedupv1.ClaimTransactionRequest) error {
	if err := checkName(r); err != nil {
		return err
	}
	wait := r.GetWait().AsDuration()
	switch {
	case r.GetClaimToken() != "" && !tokenPattern.MatchString(r.GetClaimToken()):
		return errInvalid("claim_token", "must be 16 to 64 printable ASCII characters")
	case len(r.GetClaimant()) > 256 || strings.ContainsFunc(r.GetClaimant(), unicode.IsControl):
		return errInvalid("claimant", "must be at most 256 bytes of UTF-8 without control characters")
	case len(r.GetPayloadFingerprint()) > 64:
		return errInvalid("payload_fingerprint", "must be at most 64 bytes")
	case wait < 0 || wait > maxWait:
		return errInvalid("wait", "must be 0 to 5 minutes")
	}
	return nil
}

// expiry returns the end of a claim, by ttl, by at, or by the default.
func expiry(now time.Time, ttl *durationpb.Duration, at *timestamppb.Timestamp, byDefault, longest time.Duration) (time.Time, error) {
	field, d := "ttl", byDefault
	switch {
	case ttl != nil:
		d = ttl.AsDuration()
	case at != nil:
		field, d = "expire_time", at.AsTime().Sub(now)
	}
	if d < time.Millisecond || d > longest || d%time.Millisecond != 0 {
		return time.Time{}, errInvalid(field, "must be in whole milliseconds, in the future and at most "+longest.String()+" away")
	}
	return now.Add(d), nil
}

func errInvalid(field, description string) error {
	return failure(codes.InvalidArgument, "INVALID_REQUEST", field+": "+description, &errdetails.BadRequest{
		FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field, Description: description}},
	})
}

func errNotFound() error {
	return failure(codes.NotFound, "TRANSACTION_NOT_FOUND", "the transaction is not claimed")
}

func errUnavailable() error {
	return failure(codes.Unavailable, "STORE_UNREACHABLE", "the test made the service unavailable",
		&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Millisecond)})
}

// failure returns an error with the details of the service and applied "no".
func failure(code codes.Code, reason, message string, more ...protoadapt.MessageV1) error {
	info := &errdetails.ErrorInfo{Reason: reason, Domain: "dedup.v1", Metadata: map[string]string{"applied": "no"}}
	s, err := status.New(code, message).WithDetails(append([]protoadapt.MessageV1{info}, more...)...)
	if err != nil {
		panic(err) // The code is OK or a detail cannot be encoded.
	}
	return s.Err()
}

// with returns a changed copy, because a caller may still read the original.
func with(t *dedupv1.Transaction, change func(*dedupv1.Transaction)) *dedupv1.Transaction {
	changed := proto.Clone(t).(*dedupv1.Transaction)
	change(changed)
	return changed
}
