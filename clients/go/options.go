package dedup

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

const (
	defaultBudget         = 2 * time.Second
	defaultAttemptTimeout = time.Second
	defaultBackoffBase    = 50 * time.Millisecond
	defaultBackoffMax     = time.Second

	// maxBatchEntries is the most that the contract allows for a batch.
	maxBatchEntries = 1000
)

// Option sets how a [Client] calls the service.
type Option func(*settings)

type settings struct {
	credentials    credentials.TransportCredentials
	dialOptions    []grpc.DialOption
	budget         time.Duration
	attemptTimeout time.Duration
	backoffBase    time.Duration
	backoffMax     time.Duration
	logger         *slog.Logger
	defaults       []CallOption
	maxBatch       int
	maxDelay       time.Duration
}

func newSettings(opts []Option) (settings, error) {
	s := settings{
		credentials:    insecure.NewCredentials(),
		attemptTimeout: defaultAttemptTimeout,
		backoffBase:    defaultBackoffBase,
		backoffMax:     defaultBackoffMax,
		logger:         slog.Default(),
	}
	for _, opt := range opts {
		opt(&s)
	}
	switch {
	case s.budget < 0 || s.attemptTimeout <= 0:
		return s, errors.New("dedup: the budget and the attempt time-out must be positive")
	case s.backoffBase <= 0 || s.backoffMax < s.backoffBase:
		return s, errors.New("dedup: the backoff must be positive, and its maximum no less than its base")
	case s.maxBatch < 0 || s.maxBatch > maxBatchEntries || s.maxDelay < 0:
		return s, fmt.Errorf("dedup: coalescing takes 1 to %d claims and a delay that is not negative", maxBatchEntries)
	}
	return s, nil
}

// dial returns the options of the connection.
func (s *settings) dial() []grpc.DialOption {
	return append([]grpc.DialOption{
		grpc.WithTransportCredentials(s.credentials),
		// Retries are this client's own, so that each has the same token and counts against one budget. A service
		// config from DNS must not add retries or hedging of its own.
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		// gRPC waits a second before it connects again, by default. A restarted sidecar is back sooner.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		// A batch of duplicates carries up to 1,000 results, which together outgrow the 4 MiB of the default.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
	}, s.dialOptions...)
}

// WithTransportCredentials sets TLS; without it the connection is plaintext.
func WithTransportCredentials(c credentials.TransportCredentials) Option {
	return func(s *settings) { s.credentials = c }
}

// WithDialOptions adds options of the gRPC connection, such as interceptors.
func WithDialOptions(opts ...grpc.DialOption) Option {
	return func(s *settings) { s.dialOptions = append(s.dialOptions, opts...) }
}

// WithBudget bounds each call with all its attempts. Without it a call lasts until the deadline of its context, or 2 s
// if that has none. A call never goes past the deadline of its context. A [Wait] comes on top of the budget.
func WithBudget(d time.Duration) Option {
	return func(s *settings) { s.budget = d }
}

// WithAttemptTimeout bounds each attempt of a call; the default is 1 s. A [Wait] comes on top of it.
func WithAttemptTimeout(d time.Duration) Option {
	return func(s *settings) { s.attemptTimeout = d }
}

// WithBackoff sets the pause between attempts: random, up to base doubled with each attempt, and at most maximum. What
// the service asks for comes on top. The defaults are 50 ms and 1 s.
func WithBackoff(base, maximum time.Duration) Option {
	return func(s *settings) { s.backoffBase, s.backoffMax = base, maximum }
}

// WithLogger sets where claims that were granted without the service are logged; the default is slog.Default().
func WithLogger(l *slog.Logger) Option {
	return func(s *settings) { s.logger = l }
}

// WithDefaults sets options that apply to every call, before its own.
func WithDefaults(opts ...CallOption) Option {
	return func(s *settings) { s.defaults = append(s.defaults, opts...) }
}

// WithCoalescing lets concurrent claims travel together, up to maxBatch of them in one BatchClaimTransactions. A claim
// waits at most maxDelay for others. Each keeps its own token, context, retries and error; gRPC metadata of its context
// is not sent. Claims that [Wait] travel alone.
func WithCoalescing(maxBatch int, maxDelay time.Duration) Option {
	return func(s *settings) { s.maxBatch, s.maxDelay = maxBatch, maxDelay }
}

// Policy says what becomes of a claim when the service is unavailable.
type Policy int

const (
	// Deny returns the error. It is the default.
	Deny Policy = iota
	// Allow grants the claim without the service, so that duplicates get through: the claim says FailOpen.
	Allow
)

// CallOption sets what one call asks for. Of them only [Namespace] concerns a look-up.
type CallOption func(*callSettings)

type callSettings struct {
	request dedupv1.ClaimTransactionRequest
	policy  Policy
}

// TTL sets how long the claim lives, in whole milliseconds; it replaces [ExpireTime]. The default is that of the
// namespace.
func TTL(d time.Duration) CallOption {
	return func(s *callSettings) {
		s.request.Expiry = &dedupv1.ClaimTransactionRequest_Ttl{Ttl: durationOf(d)}
	}
}

// ExpireTime sets until when the claim lives, in whole milliseconds; it replaces [TTL].
func ExpireTime(t time.Time) CallOption {
	return func(s *callSettings) {
		s.request.Expiry = &dedupv1.ClaimTransactionRequest_ExpireTime{
			ExpireTime: timestamppb.New(t.Truncate(time.Millisecond)),
		}
	}
}

// Namespace keeps the ids of different uses apart; the default is "default".
func Namespace(name string) CallOption {
	return func(s *callSettings) { s.request.Namespace = name }
}

// Claimant says who claims; duplicates are shown it.
func Claimant(name string) CallOption {
	return func(s *callSettings) { s.request.Claimant = name }
}

// Fingerprint is a digest of what the transaction is about, at most 64 bytes: the same id with another fingerprint is
// an [ErrPayloadMismatch].
func Fingerprint(digest []byte) CallOption {
	return func(s *callSettings) { s.request.PayloadFingerprint = digest }
}

// Wait lets a duplicate of work in progress wait for its end before it is answered, at most 5 minutes. It comes on top
// of the budget and of the time-out of an attempt, and never goes past the deadline of the context.
func Wait(d time.Duration) CallOption {
	return func(s *callSettings) { s.request.Wait = durationOf(d) }
}

// Token claims with this token instead of a fresh one, to repeat a claim of which the answer was lost. Two workers must
// never share one: both would be granted the claim.
func Token(token string) CallOption {
	return func(s *callSettings) { s.request.ClaimToken = token }
}

// OnUnavailable sets what becomes of the claim when the service is unavailable; the default is [Deny].
func OnUnavailable(p Policy) CallOption {
	return func(s *callSettings) { s.policy = p }
}

// CompleteOption sets how a completed transaction is remembered.
type CompleteOption func(*dedupv1.CompleteTransactionRequest)

// RetainFor sets how long the completed transaction is remembered; the default is the retention of the namespace.
func RetainFor(d time.Duration) CompleteOption {
	return func(r *dedupv1.CompleteTransactionRequest) {
		r.Retention = &dedupv1.CompleteTransactionRequest_Ttl{Ttl: durationOf(d)}
	}
}

// RetainUntil sets until when the completed transaction is remembered.
func RetainUntil(t time.Time) CompleteOption {
	return func(r *dedupv1.CompleteTransactionRequest) {
		r.Retention = &dedupv1.CompleteTransactionRequest_ExpireTime{
			ExpireTime: timestamppb.New(t.Truncate(time.Millisecond)),
		}
	}
}

// durationOf drops what is finer than the millisecond of the contract, which the service would refuse.
func durationOf(d time.Duration) *durationpb.Duration {
	return durationpb.New(d.Truncate(time.Millisecond))
}
