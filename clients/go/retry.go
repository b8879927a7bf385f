package dedup

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
)

// call repeats an attempt until it succeeds, its error is not retryable, or the budget is spent.
//
// It returns the number of failed attempts that may have been applied.
func (c *Client) call(ctx context.Context, wait time.Duration, attempt func(context.Context) error) (unheard int, failure *Error) {
	ctx, cancel := c.withBudget(ctx, wait)
	defer cancel()
	for n := 1; ; n++ {
		err := c.attempt(ctx, wait, attempt)
		if err == nil {
			return unheard, nil
		}
		e := newError(err)
		e.Attempts = n
		// If the caller cancelled, the check below corrects this.
		e.cutOff = e.Code == codes.Canceled && !c.closed()
		if e.Applied == AppliedUnknown {
			unheard++
		}
		if unheard > 0 {
			e.Applied = AppliedUnknown
		}
		if !e.retryable() {
			return unheard, e
		}
		if pause := e.retryDelay + c.jitter(n); fits(ctx, pause) && sleep(ctx, pause) == nil {
			continue
		}
		if errors.Is(ctx.Err(), context.Canceled) {
			// A call cancelled by its caller is not an unavailable service.
			e.status = status.FromContextError(ctx.Err())
			e.Code, e.Message, e.cutOff = e.status.Code(), e.status.Message(), false
		}
		return unheard, e
	}
}

// closed reports whether the client was closed, which cancels in-flight calls. It is always false for NewFromStub.
func (c *Client) closed() bool {
	return c.conn != nil && c.conn.GetState() == connectivity.Shutdown
}

// fits reports whether the context outlasts the pause. If not, waiting would only delay the error.
func fits(ctx context.Context, pause time.Duration) bool {
	deadline, ok := ctx.Deadline()
	return !ok || time.Until(deadline) > pause
}

// withBudget limits a call by the budget, else by the deadline of its context, else by the default budget.
func (c *Client) withBudget(ctx context.Context, wait time.Duration) (context.Context, context.CancelFunc) {
	budget := c.settings.budget
	if budget == 0 {
		if _, ok := ctx.Deadline(); ok {
			return ctx, func() {}
		}
		budget = defaultBudget
	}
	return context.WithTimeout(ctx, budget+wait)
}

func (c *Client) attempt(ctx context.Context, wait time.Duration, attempt func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, c.settings.attemptTimeout+wait)
	defer cancel()
	return attempt(ctx)
}

// jitter returns a random pause between 0 and the backoff ("full jitter"), which spreads the retries of many callers.
func (c *Client) jitter(attempts int) time.Duration {
	limit := c.settings.backoffMax
	// More than 30 doublings exceed any sensible limit and would overflow.
	if shift := attempts - 1; shift < 30 {
		limit = min(limit, c.settings.backoffBase<<shift)
	}
	return rand.N(limit)
}

// sleep waits, unless the context ends first.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	// If both happened, the end of the context counts.
	return ctx.Err()
}
