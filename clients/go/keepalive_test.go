//go:build go1.25

package dedup

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// keepAlive is clients/golden/keep_alive.json, which every client implements.
type keepAlive struct {
	KeepAlive struct {
		ShortestRepeatMS float64 `json:"shortest_repeat_ms"`
		LongestJitter    float64 `json:"longest_jitter"`
		MaxHoldMS        float64 `json:"max_hold_ms"`
	} `json:"keep_alive"`
	Cases []struct {
		LeaseMS         float64 `json:"lease_ms"`
		Jitter          float64 `json:"jitter"`
		NextExtensionMS float64 `json:"next_extension_ms"`
		RepeatMS        float64 `json:"repeat_ms"`
		LostAfterMS     float64 `json:"lost_after_ms"`
	} `json:"cases"`
}

func millis(ms float64) time.Duration {
	return time.Duration(math.Round(ms * float64(time.Millisecond)))
}

func TestKeepAliveTimingMatchesTheSharedFile(t *testing.T) {
	data, err := os.ReadFile("../golden/keep_alive.json")
	if err != nil {
		t.Fatal(err)
	}
	var golden keepAlive
	if err := json.Unmarshal(data, &golden); err != nil || len(golden.Cases) == 0 {
		t.Fatal(golden, err)
	}
	if shortestRepeat != millis(golden.KeepAlive.ShortestRepeatMS) || longestJitter != golden.KeepAlive.LongestJitter ||
		defaultMaxHold != millis(golden.KeepAlive.MaxHoldMS) {
		t.Errorf("constants differ from %+v", golden.KeepAlive)
	}
	for _, c := range golden.Cases {
		length := millis(c.LeaseMS)
		for what, pair := range map[string][2]time.Duration{
			"next extension": {nextExtension(length, c.Jitter), millis(c.NextExtensionMS)},
			"repeat":         {repeat(length), millis(c.RepeatMS)},
			"lost":           {lostAfter(length), millis(c.LostAfterMS)},
		} {
			if pair[0] != pair[1] {
				t.Errorf("lease of %v: %s after %v, want %v", length, what, pair[0], pair[1])
			}
		}
		// The same times, as the service sees them: one extension that fails, its repeats, and the loss.
		synctest.Test(t, func(t *testing.T) {
			s := &leased{}
			client := s.client(t, c.Jitter)
			s.answer = func(context.Context, int) (dedupv1.ExtendOutcome, error) {
				return 0, status.Error(codes.Unavailable, "down")
			}
			ctx, stop := s.claim(t, client, length).KeepAlive(t.Context(), MaxHold(10*length))
			defer stop()
			<-ctx.Done()
			if !errors.Is(context.Cause(ctx), ErrClaimLost) || s.elapsed() != millis(c.LostAfterMS) {
				t.Errorf("lease of %v: %v after %v", length, context.Cause(ctx), s.elapsed())
			}
			want := millis(c.NextExtensionMS)
			for i, at := range s.extensions() {
				if at != want {
					t.Errorf("lease of %v: extension %d after %v, want %v", length, i, at, want)
				}
				want += millis(c.RepeatMS)
			}
			if want < millis(c.LostAfterMS) {
				t.Errorf("lease of %v: no extension after %v", length, want)
			}
		})
	}
}

// leased is a service that records when it is asked for extensions.
type leased struct {
	dedupv1.DedupServiceClient

	mu       sync.Mutex
	began    time.Time
	sent     []time.Duration
	ttls     []time.Duration
	answer   func(ctx context.Context, n int) (dedupv1.ExtendOutcome, error) // nil: EXTENDED
	replayed bool
}

func (s *leased) client(t *testing.T, random float64) *Client {
	t.Helper()
	client, err := NewFromStub(s)
	if err != nil {
		t.Fatal(err)
	}
	client.keeper.random = func() float64 { return random }
	return client
}

func (s *leased) claim(t *testing.T, client *Client, ttl time.Duration) *Claim {
	t.Helper()
	s.began = time.Now()
	claim, err := client.Claim(t.Context(), "x", TTL(ttl))
	if err != nil {
		t.Fatal(err)
	}
	return claim
}

func (s *leased) elapsed() time.Duration { return time.Since(s.began) }

func (s *leased) extensions() []time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]time.Duration(nil), s.sent...)
}

func (s *leased) ClaimTransaction(context.Context, *dedupv1.ClaimTransactionRequest, ...grpc.CallOption) (*dedupv1.ClaimTransactionResponse, error) {
	return &dedupv1.ClaimTransactionResponse{
		Outcome: dedupv1.ClaimOutcome_CLAIM_OUTCOME_CLAIMED, Replayed: s.replayed,
		Transaction: &dedupv1.Transaction{ClaimTime: timestamppb.Now(), ExpireTime: timestamppb.New(time.Now().Add(time.Minute))},
	}, nil
}

func (s *leased) ExtendTransaction(ctx context.Context, r *dedupv1.ExtendTransactionRequest, _ ...grpc.CallOption) (*dedupv1.ExtendTransactionResponse, error) {
	s.mu.Lock()
	s.sent = append(s.sent, time.Since(s.began))
	s.ttls = append(s.ttls, r.GetTtl().AsDuration())
	n := len(s.sent)
	s.mu.Unlock()
	outcome, err := dedupv1.ExtendOutcome_EXTEND_OUTCOME_EXTENDED, error(nil)
	if s.answer != nil {
		outcome, err = s.answer(ctx, n)
	}
	return &dedupv1.ExtendTransactionResponse{Outcome: outcome}, err
}

func (*leased) CompleteTransaction(context.Context, *dedupv1.CompleteTransactionRequest, ...grpc.CallOption) (*dedupv1.CompleteTransactionResponse, error) {
	return &dedupv1.CompleteTransactionResponse{Outcome: dedupv1.CompleteOutcome_COMPLETE_OUTCOME_COMPLETED}, nil
}

func TestClaimIsExtendedUntilItsEnd(t *testing.T) {
	for name, end := range map[string]func(*Claim, context.CancelFunc){
		"stop":     func(_ *Claim, stop context.CancelFunc) { stop() },
		"complete": func(c *Claim, _ context.CancelFunc) { _ = c.Complete(context.Background(), nil) },
	} {
		// The bubble fails if a goroutine remains.
		synctest.Test(t, func(t *testing.T) {
			s := &leased{}
			claim := s.claim(t, s.client(t, 0), time.Minute)
			ctx, stop := claim.KeepAlive(t.Context())
			time.Sleep(150 * time.Second)
			end(claim, stop)
			synctest.Wait()
			if got := s.extensions(); len(got) != 7 || got[0] != 20*time.Second || got[6] != 140*time.Second || s.ttls[0] != time.Minute {
				t.Errorf("%s: extended at %v by %v", name, got, s.ttls)
			}
			if errors.Is(context.Cause(ctx), ErrClaimLost) {
				t.Errorf("%s: lost", name)
			}
			time.Sleep(time.Hour)
			stop()
			time.Sleep(time.Hour)
			if got := s.extensions(); len(got) != 7 || !errors.Is(context.Cause(ctx), context.Canceled) {
				t.Errorf("%s: extended at %v, %v", name, got, context.Cause(ctx))
			}
		})
	}
}

func TestNotHeldIsLostAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &leased{answer: func(context.Context, int) (dedupv1.ExtendOutcome, error) {
			return dedupv1.ExtendOutcome_EXTEND_OUTCOME_NOT_HELD, nil
		}}
		claim := s.claim(t, s.client(t, 0), time.Minute)
		limited, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		ctx, stop := claim.KeepAlive(limited)
		defer stop()
		<-ctx.Done()
		if context.Cause(ctx) != ErrClaimLost || s.elapsed() != 20*time.Second {
			t.Errorf("%v after %v", context.Cause(ctx), s.elapsed())
		}
		if err := claim.Complete(ctx, nil); err != nil {
			t.Errorf("complete after the loss: %v", err)
		}
	})
}

func TestReplayedClaimIsExtendedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &leased{replayed: true}
		_, stop := s.claim(t, s.client(t, 0), time.Minute).KeepAlive(t.Context())
		time.Sleep(time.Second)
		stop()
		if got := s.extensions(); len(got) != 1 || got[0] != 0 {
			t.Errorf("extended at %v", got)
		}
	})
}

func TestMaxHoldEndsTheExtensions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &leased{}
		limited, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		ctx, stop := s.claim(t, s.client(t, 0), time.Minute).KeepAlive(limited, MaxHold(90*time.Second))
		defer stop()
		<-ctx.Done()
		// Extensions at 20 s (to 80 s) and at 40 s (to 90 s); the last tenth of the lease remains.
		if got := s.extensions(); len(got) != 2 || s.ttls[1] != 50*time.Second || s.elapsed() != 84*time.Second {
			t.Errorf("extended at %v by %v, lost after %v", got, s.ttls, s.elapsed())
		}
		if context.Cause(ctx) != ErrClaimLost {
			t.Error(context.Cause(ctx))
		}
	})
}

func TestHangingExtensionDelaysNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &leased{}
		s.answer = func(ctx context.Context, n int) (dedupv1.ExtendOutcome, error) {
			if n == 1 {
				<-ctx.Done()
				return 0, status.FromContextError(ctx.Err()).Err()
			}
			return dedupv1.ExtendOutcome_EXTEND_OUTCOME_EXTENDED, nil
		}
		client := s.client(t, 0)
		first, stopFirst := s.claim(t, client, 3*time.Second).KeepAlive(t.Context())
		second, stopSecond := s.claim(t, client, 3*time.Second).KeepAlive(t.Context())
		time.Sleep(1500 * time.Millisecond)
		// Both are due at 1 s. The one that hangs is repeated after 0.3 s, before it times out.
		if got := s.extensions(); len(got) != 3 || got[1] != time.Second || got[2] != 1300*time.Millisecond {
			t.Errorf("extended at %v", got)
		}
		if first.Err() != nil || second.Err() != nil {
			t.Error(context.Cause(first), context.Cause(second))
		}
		stopFirst()
		stopSecond()
	})
}

func TestManyClaimsShareOneGoroutineAndBoundTheirCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const claims = 3 * maxInFlightKept
		var mu sync.Mutex
		inFlight, most := 0, 0
		s := &leased{answer: func(ctx context.Context, _ int) (dedupv1.ExtendOutcome, error) {
			mu.Lock()
			inFlight++
			most = max(most, inFlight)
			mu.Unlock()
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
			}
			mu.Lock()
			inFlight--
			mu.Unlock()
			return dedupv1.ExtendOutcome_EXTEND_OUTCOME_EXTENDED, nil
		}}
		client := s.client(t, 0)
		client.keeper.attemptTimeout = time.Minute
		var contexts []context.Context
		for range claims {
			ctx, stop := s.claim(t, client, time.Minute).KeepAlive(t.Context())
			defer stop()
			contexts = append(contexts, ctx)
		}
		time.Sleep(5 * time.Minute)
		for i, ctx := range contexts {
			if ctx.Err() != nil {
				t.Fatalf("claim %d: %v", i, context.Cause(ctx))
			}
		}
		mu.Lock()
		defer mu.Unlock()
		if most != maxInFlightKept {
			t.Errorf("%d extensions in flight, want %d", most, maxInFlightKept)
		}
	})
}

func TestCloseTellsTheWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &leased{answer: func(ctx context.Context, _ int) (dedupv1.ExtendOutcome, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		}}
		client := s.client(t, 0)
		client.keeper.attemptTimeout = time.Hour
		claim := s.claim(t, client, time.Minute)
		ctx, stop := claim.KeepAlive(t.Context())
		defer stop()
		time.Sleep(25 * time.Second)
		if err := client.Close(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if context.Cause(ctx) != ErrClaimLost {
			t.Errorf("after Close: %v", context.Cause(ctx))
		}
	})
}

func TestClaimsWithAFixedEndOrWithoutAClaimAreNotExtended(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &leased{}
		client := s.client(t, 0)
		fixed, err := client.Claim(t.Context(), "x", ExpireTime(time.Now().Add(time.Minute)))
		if err != nil {
			t.Fatal(err)
		}
		for name, claim := range map[string]*Claim{"expire time": fixed, "fail open": {FailOpen: true, client: client, ended: &atomic.Bool{}}} {
			ctx, stop := claim.KeepAlive(t.Context())
			time.Sleep(2 * time.Minute)
			if got := s.extensions(); len(got) != 0 || ctx.Err() != nil {
				t.Errorf("%s: extended at %v, %v", name, got, ctx.Err())
			}
			stop()
		}
	})
}

func TestExplicitExtensionPostponesTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &leased{}
		claim := s.claim(t, s.client(t, 0), time.Minute)
		ctx, stop := claim.KeepAlive(t.Context(), MaxHold(time.Hour))
		defer stop()
		if _, err := claim.Extend(t.Context(), 10*time.Minute); err != nil {
			t.Fatal(err)
		}
		time.Sleep(570 * time.Second)
		if got := s.extensions(); len(got) != 2 || got[1] != 560*time.Second || ctx.Err() != nil {
			t.Errorf("extended at %v, %v", got, context.Cause(ctx))
		}
	})
}

func TestShorteningEndsKeepAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &leased{}
		claim := s.claim(t, s.client(t, 0), time.Minute)
		ctx, stop := claim.KeepAlive(t.Context())
		defer stop()
		if _, err := claim.Extend(t.Context(), 5*time.Second, AllowShortening()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if got := s.extensions(); len(got) != 1 || ctx.Err() != nil {
			t.Errorf("extended at %v, %v: the next extension makes the claim longer again", got, context.Cause(ctx))
		}
	})
}
