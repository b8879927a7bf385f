package dedup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// Claim is the right to do the work of a transaction until it expires, is completed or is released.
type Claim struct {
	// Transaction is the stored transaction; the holder's with ShadowDuplicate. With FailOpen it has only an ID and a
	// Namespace.
	Transaction Transaction
	// Token authorises Complete, Release and Extend. Keep it secret.
	Token string `json:"-"`
	// Replayed reports that an earlier attempt with this token made the claim and its reply was lost.
	Replayed bool
	// ShadowDuplicate reports that only the namespace's shadow mode let the claim pass. Complete, Release and Extend
	// change nothing and return no error.
	ShadowDuplicate bool
	// FailOpen reports that the service was unavailable and [Allow] granted the claim, which may be a duplicate.
	// Complete, Release and Extend write a log line, change nothing and return no error.
	FailOpen bool

	client        *Client
	id, namespace string
	lease         *lease // nil for a claim that cannot be kept alive
	ended         *atomic.Bool
}

// Ended reports whether Complete or Release was called. Guards leave such a claim alone.
func (c *Claim) Ended() bool { return c.ended.Load() }

type claimKey struct{}

// NewContext returns a copy of ctx with the claim. The guards call it for their handlers.
func NewContext(ctx context.Context, c *Claim) context.Context {
	return context.WithValue(ctx, claimKey{}, c)
}

// FromContext returns the claim of a guarded handler, or nil.
func FromContext(ctx context.Context) *Claim {
	c, _ := ctx.Value(claimKey{}).(*Claim)
	return c
}

// Complete marks the work as done and stores the result for later duplicates. It ends [Claim.KeepAlive] and, within one
// budget, continues after the end of ctx.
//
// The error matches ErrNotHeld if the claim is no longer held, and ErrResultNotStored if the transaction is completed
// but the service rejected the result. Repeating Complete with the same result is safe.
func (c *Claim) Complete(ctx context.Context, result []byte, opts ...CompleteOption) error {
	c.end()
	if c.FailOpen {
		c.skipped(ctx, "complete")
		return nil
	}
	ctx, cancel := c.client.finishing(ctx)
	defer cancel()
	request := &dedupv1.CompleteTransactionRequest{
		TransactionId: c.id, Namespace: c.namespace, ClaimToken: c.Token, Result: result,
	}
	for _, opt := range opts {
		opt(request)
	}
	var rejected error
	if len(result) > maxResultBytes {
		rejected = invalid("result", fmt.Sprintf("has %d bytes, at most %d are allowed", len(result), maxResultBytes))
	} else if err := c.complete(ctx, request); !rejectsResult(err) {
		return err
	} else {
		rejected = err
	}
	// The work is done and must not run again.
	request.Result = nil
	if err := c.complete(ctx, request); err != nil {
		return err
	}
	return fmt.Errorf("%w: %w", ErrResultNotStored, rejected)
}

// rejectsResult reports whether the service found fault with the result.
func rejectsResult(err error) bool {
	var e *Error
	return errors.As(err, &e) && slices.ContainsFunc(e.Violations, func(v Violation) bool { return v.Field == "result" })
}

func (c *Claim) complete(ctx context.Context, request *dedupv1.CompleteTransactionRequest) error {
	var reply *dedupv1.CompleteTransactionResponse
	_, failure := c.client.call(ctx, 0, func(ctx context.Context) (err error) {
		reply, err = c.client.stub.CompleteTransaction(ctx, request)
		return err
	})
	if failure != nil {
		return failure
	}
	switch outcome := reply.GetOutcome(); outcome {
	case dedupv1.CompleteOutcome_COMPLETE_OUTCOME_COMPLETED:
		return nil
	case dedupv1.CompleteOutcome_COMPLETE_OUTCOME_NOT_HELD:
		return c.notHeld("complete")
	default:
		return unspecified("a completion", outcome)
	}
}

// Release gives up the claim: the next caller may claim at once. Release only work that certainly had no effect. It ends
// [Claim.KeepAlive] and, within one budget, continues after the end of ctx.
//
// The error matches ErrNotHeld if the claim is no longer held, but is nil if the reply of an earlier attempt was lost,
// because that attempt may have released the claim.
func (c *Claim) Release(ctx context.Context) error {
	c.end()
	if c.FailOpen {
		c.skipped(ctx, "release")
		return nil
	}
	ctx, cancel := c.client.finishing(ctx)
	defer cancel()
	request := &dedupv1.ReleaseTransactionRequest{TransactionId: c.id, Namespace: c.namespace, ClaimToken: c.Token}
	var reply *dedupv1.ReleaseTransactionResponse
	unheard, failure := c.client.call(ctx, 0, func(ctx context.Context) (err error) {
		reply, err = c.client.stub.ReleaseTransaction(ctx, request)
		return err
	})
	if failure != nil {
		return failure
	}
	switch outcome := reply.GetOutcome(); outcome {
	case dedupv1.ReleaseOutcome_RELEASE_OUTCOME_RELEASED:
		return nil
	case dedupv1.ReleaseOutcome_RELEASE_OUTCOME_NOT_HELD:
		if unheard > 0 {
			return nil
		}
		return c.notHeld("release")
	default:
		return unspecified("a release", outcome)
	}
}

// Extend moves the end of the claim to ttl from now and returns the new end. A ttl of 0 is the namespace's default. An
// earlier end has no effect without [AllowShortening].
//
// The error matches ErrNotHeld if the claim is no longer held. Stop the work then: another caller may do it.
func (c *Claim) Extend(ctx context.Context, ttl time.Duration, opts ...ExtendOption) (time.Time, error) {
	if c.FailOpen {
		c.skipped(ctx, "extend")
		return time.Time{}, nil
	}
	request := &dedupv1.ExtendTransactionRequest{
		TransactionId: c.id, Namespace: c.namespace, ClaimToken: c.Token,
	}
	if ttl != 0 {
		request.Expiry = &dedupv1.ExtendTransactionRequest_Ttl{Ttl: durationOf(ttl)}
	}
	for _, opt := range opts {
		opt(request)
	}
	if request.AllowShortening && c.lease != nil {
		c.client.keeper.end(c.lease) // It does not know the new lease.
	}
	var reply *dedupv1.ExtendTransactionResponse
	var sent time.Time
	_, failure := c.client.call(ctx, 0, func(ctx context.Context) (err error) {
		sent = time.Now()
		reply, err = c.client.stub.ExtendTransaction(ctx, request)
		return err
	})
	if failure != nil {
		return time.Time{}, failure
	}
	switch outcome := reply.GetOutcome(); outcome {
	case dedupv1.ExtendOutcome_EXTEND_OUTCOME_EXTENDED:
		if c.lease != nil && ttl != 0 {
			c.client.keeper.extended(c.lease, sent.Add(ttl))
		}
		return timeOf(reply.GetTransaction().GetExpireTime()), nil
	case dedupv1.ExtendOutcome_EXTEND_OUTCOME_NOT_HELD:
		return time.Time{}, c.notHeld("extend")
	default:
		return time.Time{}, unspecified("an extension", outcome)
	}
}

func (c *Claim) end() {
	c.ended.Store(true)
	if c.lease != nil {
		c.client.keeper.end(c.lease)
	}
}

// notHeld returns nil for a shadow duplicate, which never held the claim.
func (c *Claim) notHeld(call string) error {
	if c.ShadowDuplicate {
		return nil
	}
	return fmt.Errorf("%s: %w", call, ErrNotHeld)
}

// skipped logs a call on a fail-open claim.
func (c *Claim) skipped(ctx context.Context, call string) {
	c.client.settings.logger.LogAttrs(ctx, slog.LevelInfo, "dedup: nothing to "+call+", claim granted without the service",
		slog.String("transaction", hashed(c.id)))
}

// String returns the hashed id and the state of the claim, without its token.
func (c Claim) String() string {
	return fmt.Sprintf("claim of %s in %s, fail open: %t, shadow duplicate: %t", hashed(c.id), c.namespaceName(), c.FailOpen, c.ShadowDuplicate)
}

// GoString returns the same text as String.
func (c Claim) GoString() string { return c.String() }

// LogValue returns the hashed id, without the token.
func (c Claim) LogValue() slog.Value {
	return slog.GroupValue(slog.String("transaction", hashed(c.id)), slog.String("namespace", c.namespaceName()),
		slog.Bool("fail_open", c.FailOpen), slog.Bool("shadow_duplicate", c.ShadowDuplicate))
}

func (c Claim) namespaceName() string { return cmp.Or(c.namespace, "default") }
