package dedup

import (
	"errors"
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

	// maxResultBytes is the largest result that any service can be configured to keep.
	maxResultBytes = 1 << 20
)

// Option configures a [Client].
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
	coalescing     *bool // nil if not set
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
		return s, errors.New("dedup: the budget and the attempt timeout must be positive")
	case s.backoffBase <= 0 || s.backoffMax < s.backoffBase:
		return s, errors.New("dedup: the backoff must be positive and its maximum at least its base")
	}
	return s, nil
}

// coalesces reports whether claims are coalesced.
func (s *settings) coalesces() bool {
	if s.coalescing != nil {
		return *s.coalescing
	}
	return len(s.dialOptions) == 0
}

// dial returns the options of the connection.
func (s *settings) dial() []grpc.DialOption {
	return append([]grpc.DialOption{
		grpc.WithTransportCredentials(s.credentials),
		// A service config from DNS must not add retries.
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		// Spreads calls over all addresses of a target, and moves on when one stops.
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`),
		// gRPC's default is one second; a restarted sidecar is back sooner.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithStatsHandler(progressHandler{}),
		// 1,000 results exceed gRPC's default of 4 MiB.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
	}, s.dialOptions...)
}

// WithTransportCredentials sets the transport credentials, such as TLS. The default is plaintext.
func WithTransportCredentials(c credentials.TransportCredentials) Option {
	return func(s *settings) { s.credentials = c }
}

// WithDialOptions adds options of the gRPC connection, such as interceptors. An interceptor finds x-correlation-id in
// the trailing metadata only of logged calls; a quick success usually has none.
func WithDialOptions(opts ...grpc.DialOption) Option {
	return func(s *settings) { s.dialOptions = append(s.dialOptions, opts...) }
}

// WithBudget limits each call with all its attempts; a [Wait] is added. The default is the deadline of the context,
// which always applies, or 2 s without one.
func WithBudget(d time.Duration) Option {
	return func(s *settings) { s.budget = d }
}

// WithAttemptTimeout limits each attempt; a [Wait] is added. The default is 1 s.
func WithAttemptTimeout(d time.Duration) Option {
	return func(s *settings) { s.attemptTimeout = d }
}

// WithBackoff limits the random backoff: base, doubled after each attempt, up to maximum. The service's delay is added.
// The defaults are 50 ms and 1 s.
func WithBackoff(base, maximum time.Duration) Option {
	return func(s *settings) { s.backoffBase, s.backoffMax = base, maximum }
}

// WithLogger sets the logger for fail-open claims. The default is slog.Default().
func WithLogger(l *slog.Logger) Option {
	return func(s *settings) { s.logger = l }
}

// WithDefaults sets options for every call; its own options override them.
func WithDefaults(opts ...CallOption) Option {
	return func(s *settings) { s.defaults = append(s.defaults, opts...) }
}

// WithCoalescing sets whether claims that find another in flight are sent together in one call. It is the default, except
// with [WithDialOptions] and [NewFromStub]: interceptors and stats handlers may read the context of a caller, which a
// batch does not have.
func WithCoalescing(on bool) Option {
	return func(s *settings) { s.coalescing = &on }
}

// Policy selects the result of a claim while the service is unavailable.
type Policy int

const (
	// Deny returns the error. It is the default.
	Deny Policy = iota
	// Allow grants the claim, perhaps a duplicate, with FailOpen set.
	Allow
)

// CallOption configures one call. Get uses only [Namespace].
type CallOption func(*callSettings)

type callSettings struct {
	request dedupv1.ClaimTransactionRequest
	policy  Policy
}

// TTL sets the claim's lifetime, truncated to milliseconds, and replaces [ExpireTime]. The default is the namespace's.
func TTL(d time.Duration) CallOption {
	return func(s *callSettings) {
		s.request.Expiry = &dedupv1.ClaimTransactionRequest_Ttl{Ttl: durationOf(d)}
	}
}

// ExpireTime sets the claim's end, truncated to milliseconds, and replaces [TTL].
func ExpireTime(t time.Time) CallOption {
	return func(s *callSettings) {
		s.request.Expiry = &dedupv1.ClaimTransactionRequest_ExpireTime{
			ExpireTime: timestamppb.New(t.Truncate(time.Millisecond)),
		}
	}
}

// Namespace separates the ids of different uses. The default is "default".
func Namespace(name string) CallOption {
	return func(s *callSettings) { s.request.Namespace = name }
}

// Claimant identifies the caller to duplicates.
func Claimant(name string) CallOption {
	return func(s *callSettings) { s.request.Claimant = name }
}

// Fingerprint sets a digest of the payload, at most 64 bytes. The same id with a different fingerprint is an
// [ErrPayloadMismatch].
func Fingerprint(digest []byte) CallOption {
	return func(s *callSettings) { s.request.PayloadFingerprint = digest }
}

// Wait makes a duplicate wait, at most 5 minutes, for the end of work in progress. It extends the budget and the
// attempt timeout, not the deadline of the context.
func Wait(d time.Duration) CallOption {
	return func(s *callSettings) { s.request.Wait = durationOf(d) }
}

// Token sets the claim token, to repeat a claim whose reply was lost. Two workers must never share one: both would
// receive the claim.
func Token(token string) CallOption {
	return func(s *callSettings) { s.request.ClaimToken = token }
}

// OnUnavailable sets the policy during an outage. The default is [Deny].
func OnUnavailable(p Policy) CallOption {
	return func(s *callSettings) { s.policy = p }
}

// ExtendOption configures [Claim.Extend].
type ExtendOption func(*dedupv1.ExtendTransactionRequest)

// AllowShortening lets an extension move the end of the claim nearer. It ends [Claim.KeepAlive].
func AllowShortening() ExtendOption {
	return func(r *dedupv1.ExtendTransactionRequest) { r.AllowShortening = true }
}

// CompleteOption configures [Claim.Complete].
type CompleteOption func(*dedupv1.CompleteTransactionRequest)

// RetainFor sets how long the completed transaction is kept. The default is the namespace's.
func RetainFor(d time.Duration) CompleteOption {
	return func(r *dedupv1.CompleteTransactionRequest) {
		r.Retention = &dedupv1.CompleteTransactionRequest_Ttl{Ttl: durationOf(d)}
	}
}

// RetainUntil sets when the completed transaction expires.
func RetainUntil(t time.Time) CompleteOption {
	return func(r *dedupv1.CompleteTransactionRequest) {
		r.Retention = &dedupv1.CompleteTransactionRequest_ExpireTime{
			ExpireTime: timestamppb.New(t.Truncate(time.Millisecond)),
		}
	}
}

// durationOf truncates to milliseconds; the service rejects a finer duration.
func durationOf(d time.Duration) *durationpb.Duration {
	return durationpb.New(d.Truncate(time.Millisecond))
}
