package dedup

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// Guard is the part of [Client] for guarded code. Package deduptest has an in-memory one.
type Guard interface {
	// See [Client.Claim].
	Claim(ctx context.Context, id string, opts ...CallOption) (*Claim, error)
	// See [Client.Get].
	Get(ctx context.Context, id string, opts ...CallOption) (*Transaction, error)
}

var _ Guard = (*Client)(nil)

// Client calls the dedup service. It is safe for concurrent use. Create one per target.
type Client struct {
	settings  settings
	stub      dedupv1.DedupServiceClient
	conn      *grpc.ClientConn // nil for NewFromStub
	coalescer *coalescer       // nil if claims are not coalesced
	keeper    *keeper
	releases  releases
	closed    atomic.Bool
}

// New returns a client for the service at target: "host:port", "unix:///path" or any other gRPC target.
//
// The client connects on the first call, so New fails only for an invalid target or option. Close the client after use.
func New(target string, opts ...Option) (*Client, error) {
	s, err := newSettings(opts)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(target, s.dial()...)
	if err != nil {
		return nil, err
	}
	c := newClient(dedupv1.NewDedupServiceClient(tracked{conn}), s)
	c.conn = conn
	return c, nil
}

// NewFromStub returns a client on the caller's stub. Disable gRPC's own retries and hedging on its connection, because
// the client retries itself. Connection options have no effect.
func NewFromStub(stub dedupv1.DedupServiceClient, opts ...Option) (*Client, error) {
	s, err := newSettings(opts)
	if err != nil {
		return nil, err
	}
	if s.coalescing == nil {
		s.coalescing = new(bool)
	}
	return newClient(stub, s), nil
}

func newClient(stub dedupv1.DedupServiceClient, s settings) *Client {
	c := &Client{settings: s, stub: stub, keeper: newKeeper(stub, s.attemptTimeout)}
	if s.coalesces() {
		c.coalescer = newCoalescer(stub, s.attemptTimeout)
	}
	return c
}

// Close closes the client for good: in-flight and later calls fail with [ErrClosed], and contexts of [Claim.KeepAlive]
// end with [ErrClaimLost]. It first waits, at most one budget, for the release of cancelled claims.
func (c *Client) Close() error {
	c.keeper.close()
	c.releases.close()
	c.closed.Store(true)
	if c.conn == nil {
		return nil
	}
	return c.conn.Close()
}

// Claim claims a transaction. Start the work only if the error is nil.
//
// The error is a [*DuplicateError] if another caller holds or completed the transaction and a [*PayloadMismatchError]
// if the fingerprint differs. After any other error the transaction may be a duplicate.
func (c *Client) Claim(ctx context.Context, id string, opts ...CallOption) (*Claim, error) {
	var call callSettings
	c.apply(&call, opts)
	request := &call.request
	request.TransactionId = id
	ownToken := request.ClaimToken == ""
	if ownToken {
		request.ClaimToken = newToken()
	}
	if err := checkText(request); err != nil {
		return nil, err
	}
	wait := max(0, request.GetWait().AsDuration())
	send := c.claimAlone
	if c.coalescer != nil {
		send = c.coalescer.claim
	}
	var reply *dedupv1.ClaimTransactionResponse
	var first, sent time.Time
	_, failure := c.call(ctx, wait, func(ctx context.Context) (err error) {
		sent = time.Now()
		if first.IsZero() {
			first = sent
		}
		reply, err = send(ctx, request)
		send = c.claimAlone // Retries travel alone: the batch may have been the fault.
		return err
	})
	if failure != nil {
		if call.policy == Allow && failure.unavailable() {
			return c.failOpen(ctx, request, failure), nil
		}
		// The caller of a cancelled claim does no work. A token of its own may hold the claim for it elsewhere.
		if ctx.Err() != nil && failure.Applied != AppliedNo && ownToken {
			c.abandon(ctx, request)
		}
		return nil, failure
	}
	transaction := fromProto(reply.GetTransaction())
	switch outcome := reply.GetOutcome(); outcome {
	case dedupv1.ClaimOutcome_CLAIM_OUTCOME_CLAIMED:
		claim := &Claim{
			Transaction:     transaction,
			Token:           request.GetClaimToken(),
			Replayed:        reply.GetReplayed(),
			ShadowDuplicate: reply.GetShadowDuplicate(),
			client:          c,
			id:              id,
			namespace:       request.GetNamespace(),
			ended:           &atomic.Bool{},
		}
		if claim.Replayed {
			sent = first
		}
		if wait > 0 {
			// The claim was made at the end of the wait; only the reply's way is unknown.
			if latest := time.Now().Add(-c.settings.attemptTimeout); latest.After(sent) {
				sent = latest
			}
		}
		claim.lease = newLease(claim, request, sent)
		return claim, nil
	case dedupv1.ClaimOutcome_CLAIM_OUTCOME_DUPLICATE:
		return nil, &DuplicateError{Transaction: transaction}
	case dedupv1.ClaimOutcome_CLAIM_OUTCOME_PAYLOAD_MISMATCH:
		return nil, &PayloadMismatchError{Transaction: transaction}
	default:
		return nil, unspecified("a claim", outcome)
	}
}

// Get returns a transaction without changing it. The error matches ErrNotFound if the transaction is not claimed.
func (c *Client) Get(ctx context.Context, id string, opts ...CallOption) (*Transaction, error) {
	var call callSettings
	c.apply(&call, opts)
	request := &dedupv1.GetTransactionRequest{TransactionId: id, Namespace: call.request.GetNamespace()}
	if err := checkText(&dedupv1.ClaimTransactionRequest{TransactionId: id, Namespace: request.GetNamespace()}); err != nil {
		return nil, err
	}
	var reply *dedupv1.GetTransactionResponse
	_, failure := c.call(ctx, 0, func(ctx context.Context) (err error) {
		reply, err = c.stub.GetTransaction(ctx, request)
		return err
	})
	if failure != nil {
		return nil, failure
	}
	transaction := fromProto(reply.GetTransaction())
	return &transaction, nil
}

func (c *Client) apply(call *callSettings, opts []CallOption) {
	for _, opt := range c.settings.defaults {
		opt(call)
	}
	for _, opt := range opts {
		opt(call)
	}
}

func (c *Client) claimAlone(ctx context.Context, r *dedupv1.ClaimTransactionRequest) (*dedupv1.ClaimTransactionResponse, error) {
	return c.stub.ClaimTransaction(ctx, r)
}

func (c *Client) failOpen(ctx context.Context, r *dedupv1.ClaimTransactionRequest, cause *Error) *Claim {
	claim := &Claim{
		Transaction: Transaction{ID: r.GetTransactionId(), Namespace: r.GetNamespace()},
		Token:       r.GetClaimToken(),
		FailOpen:    true,
		client:      c,
		id:          r.GetTransactionId(),
		namespace:   r.GetNamespace(),
		ended:       &atomic.Bool{},
	}
	c.settings.logger.LogAttrs(ctx, slog.LevelWarn, "dedup: service unavailable, claim granted without it (fail open)",
		slog.String("transaction", hashed(claim.id)), slog.String("code", cause.Code.String()),
		slog.String("reason", cause.Reason), slog.String("applied", string(cause.Applied)))
	return claim
}

// hashed returns the hash of a transaction id in logs, as in the service's: an id may identify a user.
func hashed(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:8])
}

// checkText rejects text that protobuf cannot encode: it would fail a whole batch.
func checkText(r *dedupv1.ClaimTransactionRequest) error {
	for _, text := range []struct{ field, value string }{
		{"transaction_id", r.GetTransactionId()},
		{"namespace", r.GetNamespace()},
		{"claim_token", r.GetClaimToken()},
		{"claimant", r.GetClaimant()},
	} {
		if !utf8.ValidString(text.value) {
			return invalid(text.field, "must be valid UTF-8")
		}
	}
	return nil
}
