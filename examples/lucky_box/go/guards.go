package main

import (
	"context"
	"errors"
	"time"

	"github.com/redis/go-redis/v9"

	dedup "github.com/dedup-service/dedup-service/clients/go"
)

// errMultipleClick: another click came first.
var errMultipleClick = errors.New("multiple click")

// guard lets one of several clicks pass. Call finish with the work's error, or nil.
type guard interface {
	admit(ctx context.Context, transactionID string) (finish func(context.Context, error), err error)
}

// legacyGuard reads a flag and then writes it; other clicks can read it in between.
type legacyGuard struct{ cache *redis.Client }

func (g legacyGuard) admit(ctx context.Context, transactionID string) (func(context.Context, error), error) {
	switch err := g.cache.Get(ctx, transactionID).Err(); {
	case err == nil:
		return nil, errMultipleClick
	case !errors.Is(err, redis.Nil):
		return nil, err
	}
	err := g.cache.Set(ctx, transactionID, "\xc3", time.Minute).Err()
	return func(context.Context, error) {}, err
}

// sidecarGuard claims the transaction at the dedup service with one atomic command.
type sidecarGuard struct{ dedup dedup.Guard }

func (g sidecarGuard) admit(ctx context.Context, transactionID string) (func(context.Context, error), error) {
	claim, err := g.dedup.Claim(ctx, transactionID, dedup.TTL(time.Minute), dedup.Claimant("lucky-box-go"))
	if errors.Is(err, dedup.ErrDuplicate) {
		return nil, errMultipleClick
	}
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, failure error) {
		if failure != nil { // Nothing was paid.
			_ = claim.Release(ctx)
			return
		}
		_ = claim.Complete(ctx, nil)
	}, nil
}
