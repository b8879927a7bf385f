package dedup

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// call repeats an attempt until it succeeds, fails for good, or the budget is spent.
//
// It returns the number of failed attempts that may have been applied.
func (c *Client) call(ctx context.Context, wait time.Duration, attempt func(context.Context) error) (unheard int, failure *Error) {
	if c.closed.Load() {
		return 0, closedError()
	}
	ctx, cancel := c.withBudget(ctx, wait)
	defer cancel()
	for n := 1; ; n++ {
		err := c.attempt(ctx, wait, attempt)
		if err == nil {
			return unheard, nil
		}
		e := newError(err)
		e.Attempts = n
		// The check below corrects this if the caller cancelled.
		e.cutOff = e.Code == codes.Canceled && !c.closed.Load()
		e.closed = e.Code == codes.Canceled && !e.cutOff
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
			// A call cancelled by its caller is not an outage.
			e.status = status.FromContextError(ctx.Err())
			e.Code, e.Message, e.cutOff, e.closed = e.status.Code(), e.status.Message(), false, false
		}
		return unheard, e
	}
}

// fits reports whether the context outlasts the pause.
func fits(ctx context.Context, pause time.Duration) bool {
	deadline, ok := ctx.Deadline()
	return !ok || time.Until(deadline) > pause
}

// withBudget limits a call by the budget, else its context's deadline, else the default budget.
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

// finishing returns a context for a call after the work, which must not be lost with its caller's context.
func (c *Client) finishing(ctx context.Context) (context.Context, context.CancelFunc) {
	budget := c.settings.budget
	if budget == 0 {
		budget = defaultBudget
		if deadline, ok := ctx.Deadline(); ok {
			budget = max(budget, time.Until(deadline))
		}
	}
	return context.WithTimeout(context.WithoutCancel(ctx), budget)
}

func (c *Client) attempt(ctx context.Context, wait time.Duration, attempt func(context.Context) error) error {
	if err := ctx.Err(); err != nil {
		return &unsentError{status.FromContextError(err).Err()}
	}
	ctx, cancel := context.WithTimeout(ctx, c.settings.attemptTimeout+wait)
	defer cancel()
	return attempt(ctx)
}

// jitter returns a random pause up to the backoff ("full jitter"), so that failed callers retry apart.
func (c *Client) jitter(attempts int) time.Duration {
	return rand.N(c.backoff(attempts))
}

// backoff returns the longest pause after so many attempts, without the service's delay.
func (c *Client) backoff(attempts int) time.Duration {
	limit := c.settings.backoffBase
	for range attempts - 1 {
		if limit > c.settings.backoffMax/2 {
			return c.settings.backoffMax
		}
		limit *= 2
	}
	return limit
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	// The end of the context takes precedence.
	return ctx.Err()
}
