package deduptest_test

import (
	"context"
	"errors"
	"testing"
	"time"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/deduptest"
)

// The tests of package dedup run against both this service and the real one.

func TestClaimsExpireByTheTestClock(t *testing.T) {
	ctx := context.Background()
	now := time.Date(2025, 11, 28, 12, 0, 0, 0, time.UTC)
	guard := deduptest.NewGuard()
	guard.Service.SetClock(func() time.Time { return now })
	claim, err := guard.Claim(ctx, "x", dedup.TTL(time.Minute))
	if err != nil || !claim.Transaction.ExpireTime.Equal(now.Add(time.Minute)) {
		t.Fatalf("%+v, %v", claim, err)
	}
	guard.Service.Advance(time.Minute - time.Millisecond)
	if _, err := guard.Claim(ctx, "x"); !errors.Is(err, dedup.ErrDuplicate) {
		t.Errorf("before the end: %v", err)
	}
	now = now.Add(time.Millisecond)
	if _, err := guard.Claim(ctx, "x"); err != nil {
		t.Errorf("at the end: %v", err)
	}
	if err := claim.Complete(ctx, nil); !errors.Is(err, dedup.ErrNotHeld) {
		t.Errorf("the first holder: %v", err)
	}
}

func TestWaitEndsByTheTestClock(t *testing.T) {
	ctx := context.Background()
	guard := deduptest.NewGuard()
	if _, err := guard.Claim(ctx, "x", dedup.TTL(time.Hour)); err != nil {
		t.Fatal(err)
	}
	answer := make(chan error)
	go func() {
		_, err := guard.Claim(ctx, "x", dedup.Wait(time.Minute))
		answer <- err
	}()
	// The wait may begin between any two of these steps and ends with a later one.
	for {
		guard.Service.Advance(10 * time.Second)
		select {
		case err := <-answer:
			if err != nil && !errors.Is(err, dedup.ErrDuplicate) {
				t.Error(err)
			}
			return
		case <-time.After(time.Millisecond):
		}
	}
}

func TestEveryCallFailsWhileUnavailable(t *testing.T) {
	ctx := context.Background()
	guard := deduptest.NewGuard(dedup.WithBudget(50 * time.Millisecond))
	claim, err := guard.Claim(ctx, "x")
	if err != nil {
		t.Fatal(err)
	}
	guard.Service.SetUnavailable(true)
	_, claimErr := guard.Claim(ctx, "y")
	_, getErr := guard.Get(ctx, "x")
	_, extendErr := claim.Extend(ctx, time.Minute)
	for i, err := range []error{claimErr, getErr, extendErr, claim.Complete(ctx, nil), claim.Release(ctx)} {
		var e *dedup.Error
		if !errors.Is(err, dedup.ErrUnavailable) || !errors.As(err, &e) || e.Applied != dedup.AppliedNo {
			t.Errorf("call %d: %v", i, err)
		}
	}
	guard.Service.SetUnavailable(false)
	if err := claim.Complete(ctx, nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}
