package dedup

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// Claim is the right to do the work of one transaction, until it expires, is completed or is released.
type Claim struct {
	// Transaction is as the service holds it. When ShadowDuplicate is set it is that of the holder, and when FailOpen
	// is set only its id and namespace are known.
	Transaction Transaction
	// Token authorises completing, releasing and extending. Do not show it to others.
	Token string
	// Replayed means that an earlier attempt with the same token made the claim, and its answer was lost.
	Replayed bool
	// ShadowDuplicate means that the namespace runs in shadow mode, and would have refused the claim in enforce mode.
	// There is then nothing to hold: Complete, Release and Extend change nothing and return no error.
	ShadowDuplicate bool
	// FailOpen means that the service was unavailable and the caller asked for [Allow]: this may be a duplicate.
	// Complete, Release and Extend then do nothing, log that, and return no error.
	FailOpen bool

	client        *Client
	id, namespace string
}

// Complete reports the work as done, and keeps the result for later duplicates.
//
// The error matches ErrNotHeld when the claim is no longer held, and nothing was changed then. Repeating it with the
// same result is safe.
func (c *Claim) Complete(ctx context.Context, result []byte, opts ...CompleteOption) error {
	if c.FailOpen {
		c.skipped(ctx, "complete")
		return nil
	}
	request := &dedupv1.CompleteTransactionRequest{
		TransactionId: c.id, Namespace: c.namespace, ClaimToken: c.Token, Result: result,
	}
	for _, opt := range opts {
		opt(request)
	}
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

// Release gives the claim back, so that the next caller may claim at once. Release only what certainly did not happen.
//
// The error matches ErrNotHeld when the claim is no longer held. When the answer of an earlier attempt was lost that
// counts as released, since that attempt may be what released it.
func (c *Claim) Release(ctx context.Context) error {
	if c.FailOpen {
		c.skipped(ctx, "release")
		return nil
	}
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

// Extend moves the end of the claim to ttl from now, and returns the new end. It never moves it nearer.
//
// The error matches ErrNotHeld when the claim is no longer held: stop the work then, another caller may do it.
func (c *Claim) Extend(ctx context.Context, ttl time.Duration) (time.Time, error) {
	if c.FailOpen {
		c.skipped(ctx, "extend")
		return time.Time{}, nil
	}
	request := &dedupv1.ExtendTransactionRequest{
		TransactionId: c.id, Namespace: c.namespace, ClaimToken: c.Token,
		Expiry: &dedupv1.ExtendTransactionRequest_Ttl{Ttl: durationOf(ttl)},
	}
	var reply *dedupv1.ExtendTransactionResponse
	_, failure := c.client.call(ctx, 0, func(ctx context.Context) (err error) {
		reply, err = c.client.stub.ExtendTransaction(ctx, request)
		return err
	})
	if failure != nil {
		return time.Time{}, failure
	}
	switch outcome := reply.GetOutcome(); outcome {
	case dedupv1.ExtendOutcome_EXTEND_OUTCOME_EXTENDED:
		return timeOf(reply.GetTransaction().GetExpireTime()), nil
	case dedupv1.ExtendOutcome_EXTEND_OUTCOME_NOT_HELD:
		return time.Time{}, c.notHeld("extend")
	default:
		return time.Time{}, unspecified("an extension", outcome)
	}
}

// notHeld is no error in shadow mode, where a duplicate was let through on purpose and never held anything.
func (c *Claim) notHeld(call string) error {
	if c.ShadowDuplicate {
		return nil
	}
	return fmt.Errorf("%s: %w", call, ErrNotHeld)
}

// skipped says that there was nothing to do for a claim that the service knows nothing of.
func (c *Claim) skipped(ctx context.Context, call string) {
	c.client.settings.logger.LogAttrs(ctx, slog.LevelInfo, "dedup: nothing to "+call+", claim granted without the service",
		slog.String("transaction", hashed(c.id)))
}
