package dedup

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// releases are the background releases of a client. close waits for them.
type releases struct {
	mu      sync.Mutex
	closed  bool
	pending sync.WaitGroup
}

// start runs release in the background. It returns false after close.
func (r *releases) start(release func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.pending.Add(1)
	go func() {
		defer r.pending.Done()
		release()
	}()
	return true
}

func (r *releases) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.pending.Wait()
}

// abandon releases, in the background, what a cancelled call may have claimed.
func (c *Client) abandon(ctx context.Context, r *dedupv1.ClaimTransactionRequest) {
	claim := &Claim{
		Token: r.GetClaimToken(), client: c, id: r.GetTransactionId(), namespace: r.GetNamespace(), ended: &atomic.Bool{},
	}
	// The budget is the default, not the rest of the caller's deadline.
	ctx = context.WithoutCancel(ctx)
	if !c.releases.start(func() {
		err := claim.Release(ctx)
		if errors.Is(err, ErrNotHeld) {
			// The service may receive the claim after its release.
			time.Sleep(c.settings.backoffBase)
			err = claim.Release(ctx)
		}
		if err != nil && !errors.Is(err, ErrNotHeld) {
			c.notReleased(ctx, claim, err)
		}
	}) {
		c.notReleased(ctx, claim, errors.New("dedup: the client is closed"))
	}
}

func (c *Client) notReleased(ctx context.Context, claim *Claim, err error) {
	c.settings.logger.LogAttrs(ctx, slog.LevelWarn, "dedup: a cancelled claim was not released and may be held until it expires",
		slog.String("transaction", hashed(claim.id)), slog.Any("error", err))
}
