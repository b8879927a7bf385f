package dedup_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/internal/servertest"
)

var ctx = context.Background()

func TestSecondClaimIsADuplicateWithTheHolder(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		id := newID()
		first := mustClaim(t, guard, id, dedup.Claimant("anna"), dedup.TTL(time.Minute))
		if first.Replayed || first.FailOpen || first.ShadowDuplicate || first.Token == "" {
			t.Errorf("first claim: %+v", first)
		}
		_, err := guard.Claim(ctx, id)
		var duplicate *dedup.DuplicateError
		if !errors.Is(err, dedup.ErrDuplicate) || !errors.As(err, &duplicate) {
			t.Fatalf("second claim: %v", err)
		}
		got := duplicate.Transaction
		if got.ID != id || got.Namespace != "default" || got.Claimant != "anna" || got.State != dedup.StateInProgress {
			t.Errorf("holder: %+v", got)
		}
		if want := got.ClaimTime.Add(time.Minute); !got.ExpireTime.Equal(want) || !got.CompletionTime.IsZero() {
			t.Errorf("expires %v, want %v; completed %v", got.ExpireTime, want, got.CompletionTime)
		}
	})
}

func TestSameTokenReceivesTheClaimAgain(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		id := newID()
		first := mustClaim(t, guard, id)
		again := mustClaim(t, guard, id, dedup.Token(first.Token))
		if !again.Replayed || again.Token != first.Token {
			t.Errorf("claim with the same token: %+v", again)
		}
	})
}

func TestCompletedIsADuplicateWithTheResult(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		id := newID()
		claim := mustClaim(t, guard, id)
		if err := claim.Complete(ctx, []byte("paid 5"), dedup.RetainFor(time.Hour)); err != nil {
			t.Fatal(err)
		}
		if err := claim.Complete(ctx, []byte("paid 5")); err != nil {
			t.Errorf("the same completion again: %v", err)
		}
		if err := claim.Complete(ctx, []byte("paid 6")); !errors.Is(err, dedup.ErrNotHeld) {
			t.Errorf("another result: %v", err)
		}
		for _, opts := range [][]dedup.CallOption{nil, {dedup.Token(claim.Token)}} {
			_, err := guard.Claim(ctx, id, opts...)
			var duplicate *dedup.DuplicateError
			if !errors.As(err, &duplicate) {
				t.Fatalf("claim of a completed transaction: %v", err)
			}
			got := duplicate.Transaction
			if got.State != dedup.StateCompleted || !bytes.Equal(got.Result, []byte("paid 5")) || got.CompletionTime.IsZero() {
				t.Errorf("completed: %+v", got)
			}
			if !got.ExpireTime.Equal(got.CompletionTime.Add(time.Hour)) {
				t.Errorf("retained until %v, completed %v", got.ExpireTime, got.CompletionTime)
			}
		}
		if err := claim.Release(ctx); !errors.Is(err, dedup.ErrNotHeld) {
			t.Errorf("release of a completed transaction: %v", err)
		}
		if _, err := claim.Extend(ctx, time.Minute); !errors.Is(err, dedup.ErrNotHeld) {
			t.Errorf("extension of a completed transaction: %v", err)
		}
	})
}

func TestReleasedMayBeClaimedAgain(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		id := newID()
		first := mustClaim(t, guard, id)
		if err := first.Release(ctx); err != nil {
			t.Fatal(err)
		}
		second := mustClaim(t, guard, id)
		if second.Token == first.Token {
			t.Error("two claims share a token")
		}
		if err := first.Release(ctx); !errors.Is(err, dedup.ErrNotHeld) {
			t.Errorf("release of another caller's claim: %v", err)
		}
		if err := first.Complete(ctx, nil); !errors.Is(err, dedup.ErrNotHeld) {
			t.Errorf("completion of another caller's claim: %v", err)
		}
		if _, err := guard.Get(ctx, id); err != nil {
			t.Errorf("the second claim is gone: %v", err)
		}
	})
}

func TestExtendMovesTheEndAndShortensOnRequest(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		claim := mustClaim(t, guard, newID(), dedup.TTL(time.Minute))
		later, err := claim.Extend(ctx, time.Hour)
		if err != nil || later.Before(claim.Transaction.ExpireTime.Add(58*time.Minute)) {
			t.Fatalf("extended to %v, %v", later, err)
		}
		if same, err := claim.Extend(ctx, time.Second); err != nil || !same.Equal(later) {
			t.Errorf("a shorter extension: %v, %v, want %v", same, err, later)
		}
		sooner, err := claim.Extend(ctx, time.Minute, dedup.AllowShortening())
		if err != nil || !sooner.Before(later.Add(-50*time.Minute)) {
			t.Errorf("shortened to %v, %v", sooner, err)
		}
		if end, err := claim.Extend(ctx, 0); err != nil || end.Before(sooner) || end.After(later) {
			t.Errorf("extended by the default ttl to %v, %v", end, err)
		}
	})
}

func TestExpiredIsNotHeld(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		id := newID()
		claim := mustClaim(t, guard, id, dedup.TTL(time.Millisecond))
		servertest.Eventually(t, "the claim expires", func() bool {
			_, err := guard.Get(ctx, id)
			return errors.Is(err, dedup.ErrNotFound)
		})
		if err := claim.Complete(ctx, nil); !errors.Is(err, dedup.ErrNotHeld) {
			t.Errorf("completion: %v", err)
		}
		if _, err := claim.Extend(ctx, time.Minute); !errors.Is(err, dedup.ErrNotHeld) {
			t.Errorf("extension: %v", err)
		}
		mustClaim(t, guard, id)
	})
}

func TestDifferentFingerprintIsAMismatch(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		id := newID()
		first := mustClaim(t, guard, id, dedup.Fingerprint([]byte("a")), dedup.Claimant("anna"))
		_, err := guard.Claim(ctx, id, dedup.Fingerprint([]byte("b")))
		var mismatch *dedup.PayloadMismatchError
		if !errors.Is(err, dedup.ErrPayloadMismatch) || !errors.As(err, &mismatch) || mismatch.Transaction.Claimant != "anna" {
			t.Errorf("different fingerprint: %v", err)
		}
		_, err = guard.Claim(ctx, id, dedup.Fingerprint([]byte("b")), dedup.Token(first.Token))
		if !errors.Is(err, dedup.ErrPayloadMismatch) {
			t.Errorf("different fingerprint with the same token: %v", err)
		}
		for _, fingerprint := range [][]byte{[]byte("a"), nil} {
			if _, err := guard.Claim(ctx, id, dedup.Fingerprint(fingerprint)); !errors.Is(err, dedup.ErrDuplicate) {
				t.Errorf("fingerprint %q: %v", fingerprint, err)
			}
		}
	})
}

func TestGetChangesNothing(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		id := newID()
		if _, err := guard.Get(ctx, id); !errors.Is(err, dedup.ErrNotFound) {
			t.Errorf("not claimed: %v", err)
		}
		mustClaim(t, guard, id, dedup.Namespace("pay"), dedup.ExpireTime(time.Now().Add(time.Hour)))
		if got, err := guard.Get(ctx, id, dedup.Namespace("pay")); err != nil || got.ID != id || got.Namespace != "pay" {
			t.Errorf("Get: %+v, %v", got, err)
		}
		mustClaim(t, guard, id)
	})
}

func TestInvalidRequestsNameTheField(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		for field, claim := range map[string]func() (*dedup.Claim, error){
			"transaction_id":      func() (*dedup.Claim, error) { return guard.Claim(ctx, "") },
			"namespace":           func() (*dedup.Claim, error) { return guard.Claim(ctx, "x", dedup.Namespace("No")) },
			"ttl":                 func() (*dedup.Claim, error) { return guard.Claim(ctx, "x", dedup.TTL(0)) },
			"expire_time":         func() (*dedup.Claim, error) { return guard.Claim(ctx, "x", dedup.ExpireTime(time.Unix(1, 0))) },
			"claim_token":         func() (*dedup.Claim, error) { return guard.Claim(ctx, "x", dedup.Token("short")) },
			"claimant":            func() (*dedup.Claim, error) { return guard.Claim(ctx, "x", dedup.Claimant("\xff")) },
			"payload_fingerprint": func() (*dedup.Claim, error) { return guard.Claim(ctx, "x", dedup.Fingerprint(make([]byte, 65))) },
		} {
			_, err := claim()
			var e *dedup.Error
			if !errors.As(err, &e) || errors.Is(err, dedup.ErrUnavailable) {
				t.Fatalf("%s: %v", field, err)
			}
			if e.Code != codes.InvalidArgument || e.Reason != "INVALID_REQUEST" || e.Applied != dedup.AppliedNo || e.Attempts > 1 {
				t.Errorf("%s: %+v", field, e)
			}
			if len(e.Violations) != 1 || e.Violations[0].Field != field {
				t.Errorf("%s: violations %+v", field, e.Violations)
			}
		}
	})
}

func TestWaitEndsWithTheWork(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		for name, end := range map[string]struct {
			work func(*dedup.Claim) error
			want error
		}{
			"completed": {func(c *dedup.Claim) error { return c.Complete(ctx, []byte("paid 5")) }, dedup.ErrDuplicate},
			"released":  {func(c *dedup.Claim) error { return c.Release(ctx) }, nil},
		} {
			id := newID()
			holder := mustClaim(t, guard, id)
			answer := make(chan error)
			go func() {
				_, err := guard.Claim(ctx, id, dedup.Wait(time.Minute))
				answer <- err
			}()
			if err := end.work(holder); err != nil {
				t.Fatal(err)
			}
			if err := <-answer; !errors.Is(err, end.want) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func TestOneOfAHundredConcurrentClaimsIsGranted(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		id := newID()
		errs := make([]error, 100)
		var all sync.WaitGroup
		for i := range errs {
			all.Add(1)
			go func() {
				defer all.Done()
				_, errs[i] = guard.Claim(ctx, id)
			}()
		}
		all.Wait()
		claimed, duplicates := 0, 0
		for _, err := range errs {
			switch {
			case err == nil:
				claimed++
			case errors.Is(err, dedup.ErrDuplicate):
				duplicates++
			default:
				t.Errorf("neither claimed nor a duplicate: %v", err)
			}
		}
		if claimed != 1 || duplicates != 99 {
			t.Errorf("%d claimed and %d duplicates, want 1 and 99", claimed, duplicates)
		}
	})
}
