package dedup_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/deduptest"
	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
	"github.com/dedup-service/dedup-service/clients/go/internal/servertest"
)

// Hazard 22: the work takes longer than the ttl.
func TestKeptClaimOutlivesItsTTL(t *testing.T) {
	t.Parallel()
	client := newClient(t, embeddedServer(t).Target)
	const ttl = 6 * time.Second // A busy machine has 4 s to extend the claim.
	id := newID()
	claim := mustClaim(t, client, id, dedup.TTL(ttl))
	kept, stop := claim.KeepAlive(ctx)
	defer stop()
	servertest.Eventually(t, "2.5 ttl pass", func() bool {
		if _, err := client.Claim(ctx, id); !errors.Is(err, dedup.ErrDuplicate) {
			t.Fatalf("another caller: %v", err)
		}
		held, err := client.Get(ctx, id)
		return err == nil && held.ExpireTime.Sub(held.ClaimTime) >= 7*ttl/2
	})
	if kept.Err() != nil {
		t.Errorf("lost: %v", context.Cause(kept))
	}
	if err := claim.Complete(kept, []byte("paid 5")); err != nil {
		t.Error(err)
	}
}

// Hazard 22: the service is unreachable, and the work hears of the loss 2 s before the claim ends. The service has the
// clock of this host.
func TestWorkHearsOfTheLossBeforeTheLeaseEnds(t *testing.T) {
	t.Parallel()
	server := embeddedServer(t)
	proxy := servertest.StartProxy(t, server.Target)
	claim := mustClaim(t, newClient(t, proxy.Target), newID(), dedup.TTL(20*time.Second))
	proxy.SetUpstream("127.0.0.1:1")
	proxy.Cut()
	kept, stop := claim.KeepAlive(ctx)
	defer stop()
	<-kept.Done()
	if now := time.Now(); !now.Before(claim.Transaction.ExpireTime) {
		t.Errorf("heard at %v, the claim ended at %v", now, claim.Transaction.ExpireTime)
	}
	if context.Cause(kept) != dedup.ErrClaimLost {
		t.Error(context.Cause(kept))
	}
}

func TestCompleteAndReleaseOutliveTheirContext(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		gone, cancel := context.WithCancel(ctx)
		done, release := newID(), newID()
		first, second := mustClaim(t, guard, done), mustClaim(t, guard, release)
		cancel()
		if err := first.Complete(gone, []byte("paid 5")); err != nil {
			t.Errorf("Complete: %v", err)
		}
		if err := second.Release(gone); err != nil {
			t.Errorf("Release: %v", err)
		}
		if held, err := guard.Get(ctx, done); err != nil || held.State != dedup.StateCompleted {
			t.Errorf("completed: %v, %v", held, err)
		}
		mustClaim(t, guard, release)
	})
}

// Hazard 23: a result that the service does not keep.
func TestRejectedResultIsCompletedWithoutIt(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		for _, size := range []int{4097, 1 << 20, 1<<20 + 1, 3 << 20} {
			id := newID()
			err := mustClaim(t, guard, id).Complete(ctx, make([]byte, size))
			var e *dedup.Error
			if !errors.Is(err, dedup.ErrResultNotStored) || !errors.As(err, &e) || len(e.Violations) != 1 || e.Violations[0].Field != "result" {
				t.Errorf("%d bytes: %v", size, err)
			}
			if held, err := guard.Get(ctx, id); err != nil || held.State != dedup.StateCompleted || len(held.Result) > 0 {
				t.Errorf("%d bytes: %v, %v", size, held, err)
			}
		}
		claim := mustClaim(t, guard, newID())
		if err := claim.Complete(ctx, nil, dedup.RetainFor(-time.Second)); errors.Is(err, dedup.ErrResultNotStored) || status.Code(err) != codes.InvalidArgument {
			t.Errorf("invalid retention: %v", err)
		}
	})
}

// Hazard 26: a cancelled call must not hold its claim.
func TestCancelledClaimsAreReleased(t *testing.T) {
	onEachStore(t, func(t *testing.T, server *servertest.Server) {
		for name, opts := range map[string][]dedup.Option{"coalescing": nil, "alone": {dedup.WithCoalescing(false)}} {
			client, direct := newClient(t, server.Target, opts...), newClient(t, server.Target)
			mustClaim(t, client, newID()) // Connect.
			random := rand.New(rand.NewPCG(1, 2))
			var ids []string
			var all sync.WaitGroup
			for range 50 {
				id := newID()
				// Not a deadline, which the service would see and refuse as too near.
				leaving, leave := context.WithCancel(ctx)
				time.AfterFunc(time.Duration(random.IntN(20_000))*time.Microsecond, leave)
				all.Add(1)
				go func() {
					defer all.Done()
					defer leave()
					if claim, err := client.Claim(leaving, id); err == nil {
						_ = claim.Release(ctx)
					}
				}()
				ids = append(ids, id)
			}
			all.Wait()
			// Close waits for the releases.
			if err := client.Close(); err != nil {
				t.Error(err)
			}
			for _, id := range ids {
				if held, err := direct.Get(ctx, id); !errors.Is(err, dedup.ErrNotFound) {
					t.Errorf("%s: %v, %v", name, held, err)
				}
			}
		}
	})
}

// The claim is made, its reply is lost, and its caller leaves.
func TestClaimWithALostReplyIsReleasedOnceItsCallerLeaves(t *testing.T) {
	onEachStore(t, func(t *testing.T, server *servertest.Server) {
		proxy := servertest.StartProxy(t, server.Target)
		client, direct := newClient(t, proxy.Target), newClient(t, server.Target)
		mustClaim(t, client, newID()) // Connect.
		id := newID()
		leaving, leave := context.WithCancel(ctx)
		proxy.SwallowReplies(true)
		failure := make(chan error, 1)
		go func() {
			_, err := client.Claim(leaving, id)
			failure <- err
		}()
		held(t, direct, id)
		leave()
		if err := <-failure; !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		proxy.SwallowReplies(false)
		proxy.Cut() // The connection lost bytes and is unusable.
		servertest.Eventually(t, "the transaction is free", func() bool {
			_, err := direct.Get(ctx, id)
			return errors.Is(err, dedup.ErrNotFound)
		})
	})
}

func TestCancelledClaimIsReleasedOnlyIfItMayHold(t *testing.T) {
	released := func(int) (*dedupv1.ReleaseTransactionResponse, error) {
		return &dedupv1.ReleaseTransactionResponse{Outcome: dedupv1.ReleaseOutcome_RELEASE_OUTCOME_RELEASED}, nil
	}
	for name, c := range map[string]struct {
		failure  error
		opts     []dedup.CallOption
		release  func(int) (*dedupv1.ReleaseTransactionResponse, error) // nil: NOT_HELD
		released int
	}{
		"held":           {status.Error(codes.Canceled, "cancelled"), nil, released, 1},
		"not held yet":   {status.Error(codes.Canceled, "cancelled"), nil, nil, 2},
		"not applied":    {serviceError(codes.Unavailable, "STORE_REFUSED", "no"), nil, released, 0},
		"caller's token": {status.Error(codes.Canceled, "cancelled"), []dedup.CallOption{dedup.Token("shared-0123456789")}, released, 0},
	} {
		leaving, leave := context.WithCancel(ctx)
		s := &script{release: c.release, claim: func(context.Context, int) (*dedupv1.ClaimTransactionResponse, error) {
			leave()
			return nil, c.failure
		}}
		client := scripted(t, s)
		if _, err := client.Claim(leaving, "x", c.opts...); err == nil {
			t.Fatal("no error")
		}
		if err := client.Close(); err != nil {
			t.Error(err)
		}
		if s.released != c.released {
			t.Errorf("%s: %d releases, want %d", name, s.released, c.released)
		}
	}
}

func TestFailedBackgroundReleaseIsLogged(t *testing.T) {
	for name, closed := range map[string]bool{"refused": false, "closed": true} {
		var log strings.Builder
		leaving, leave := context.WithCancel(ctx)
		var client *dedup.Client
		s := &script{
			claim: func(context.Context, int) (*dedupv1.ClaimTransactionResponse, error) {
				if closed {
					_ = client.Close()
				}
				leave()
				return nil, status.Error(codes.Canceled, "cancelled")
			},
			release: func(int) (*dedupv1.ReleaseTransactionResponse, error) {
				return nil, serviceError(codes.Unavailable, "STORE_REFUSED", "no")
			},
		}
		client = scripted(t, s, dedup.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
		_, _ = client.Claim(leaving, "private")
		_ = client.Close()
		if got := log.String(); !strings.Contains(got, "was not released") || strings.Contains(got, "private") {
			t.Errorf("%s: logged %q", name, got)
		}
	}
}

func TestRefusedConnectionIsNotApplied(t *testing.T) {
	for name, opts := range map[string][]dedup.Option{"coalescing": nil, "alone": {dedup.WithCoalescing(false)}} {
		client := newClient(t, "127.0.0.1:1", append(opts, dedup.WithBudget(200*time.Millisecond))...)
		_, err := client.Claim(ctx, newID())
		var e *dedup.Error
		if !errors.Is(err, dedup.ErrUnavailable) || !errors.As(err, &e) || e.Applied != dedup.AppliedNo {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSentCallThatIsCutMayBeApplied(t *testing.T) {
	server := embeddedServer(t)
	proxy := servertest.StartProxy(t, server.Target)
	client, direct := newClient(t, proxy.Target, dedup.WithBudget(2*time.Second)), newClient(t, server.Target)
	mustClaim(t, client, newID()) // Connect.
	id := newID()
	proxy.SwallowReplies(true)
	failure := make(chan error, 1)
	go func() {
		_, err := client.Claim(ctx, id)
		failure <- err
	}()
	held(t, direct, id)
	proxy.SetUpstream("127.0.0.1:1")
	proxy.Cut()
	var e *dedup.Error
	if err := <-failure; !errors.As(err, &e) || e.Applied != dedup.AppliedUnknown {
		t.Errorf("%v", err)
	}
}

// Hazard 28: neither the token nor the plain id reaches a log.
func TestClaimsAndErrorsAreRedacted(t *testing.T) {
	onEach(t, func(t *testing.T, guard dedup.Guard) {
		const id, token = "private-id", "secret-token-0123456789"
		claim := mustClaim(t, guard, id, dedup.Token(token), dedup.Namespace("redacted"))
		defer func() { _ = claim.Release(ctx) }()
		_, duplicate := guard.Claim(ctx, id, dedup.Namespace("redacted"))
		_, invalid := guard.Claim(ctx, id, dedup.Token("short-token"))
		held, err := guard.Get(ctx, id, dedup.Namespace("redacted"))
		if err != nil {
			t.Fatal(err)
		}
		var log strings.Builder
		values := []any{claim, *claim, duplicate, invalid, held, struct{ Claim *dedup.Claim }{claim}}
		for _, v := range values {
			for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
				_, _ = fmt.Fprintf(&log, format+"\n", v)
			}
			slog.New(slog.NewTextHandler(&log, nil)).Info("text", "value", v)
			if v != values[5] { // JSON of the caller's own struct has the id; it is not a log format.
				slog.New(slog.NewJSONHandler(&log, nil)).Info("json", "value", v)
			}
		}
		encoded, err := json.Marshal(claim)
		if err != nil || strings.Contains(string(encoded), token) {
			t.Errorf("%s, %v", encoded, err)
		}
		for _, private := range []string{id, token, "short-token"} {
			for line := range strings.Lines(log.String()) {
				if strings.Contains(line, private) {
					t.Errorf("shows %s: %s", private, line)
				}
			}
		}
	})
}

func TestClosedClientStaysClosed(t *testing.T) {
	for name, client := range map[string]*dedup.Client{
		"live":       newClient(t, embeddedServer(t).Target, dedup.WithDefaults(dedup.OnUnavailable(dedup.Allow))),
		"coalescing": newClient(t, embeddedServer(t).Target, dedup.WithCoalescing(true)),
		"fake":       deduptest.NewGuard(dedup.WithDefaults(dedup.OnUnavailable(dedup.Allow))).Client,
	} {
		id := newID()
		claim := mustClaim(t, client, id)
		_ = client.Close()
		_ = client.Close()
		_, claimErr := client.Claim(ctx, newID())
		_, getErr := client.Get(ctx, id)
		_, extendErr := claim.Extend(ctx, time.Minute)
		for i, err := range []error{claimErr, getErr, extendErr, claim.Complete(ctx, nil), claim.Release(ctx)} {
			var e *dedup.Error
			if !errors.Is(err, dedup.ErrClosed) || errors.Is(err, dedup.ErrUnavailable) || !errors.As(err, &e) || e.Applied != dedup.AppliedNo {
				t.Errorf("%s, call %d: %v", name, i, err)
			}
		}
	}
}

func TestClosedClientLeavesNoGoroutine(t *testing.T) {
	server := embeddedServer(t)
	client := newClient(t, server.Target)
	var stops []context.CancelFunc
	for range 20 {
		_, stop := mustClaim(t, client, newID(), dedup.TTL(2*time.Second)).KeepAlive(ctx)
		stops = append(stops, stop)
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	servertest.Eventually(t, "the goroutines of keep-alive end", func() bool {
		stacks := make([]byte, 1<<20)
		return !strings.Contains(string(stacks[:runtime.Stack(stacks, true)]), "(*keeper)")
	})
	for _, stop := range stops {
		stop()
	}
}

// countPeers returns an interceptor that reports the server of each call.
func countPeers(used func(address string)) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		var server peer.Peer
		err := invoke(ctx, method, req, reply, conn, append(opts, grpc.Peer(&server))...)
		if server.Addr != nil {
			used(server.Addr.String())
		}
		return err
	}
}

func TestRoundRobinUsesEveryServer(t *testing.T) {
	url := "sqlite:///" + filepath.Join(t.TempDir(), "claims.db")
	first, second := servertest.Start(t, url), servertest.Start(t, url)
	servers := manual.NewBuilderWithScheme("servers")
	servers.InitialState(resolver.State{Addresses: []resolver.Address{{Addr: first.Target}, {Addr: second.Target}}})
	var mu sync.Mutex
	used := map[string]int{}
	client := newClient(t, "servers:///dedup",
		dedup.WithDialOptions(
			grpc.WithResolvers(servers),
			grpc.WithUnaryInterceptor(countPeers(func(address string) {
				mu.Lock()
				defer mu.Unlock()
				used[address]++
			})),
		))
	both := func() bool {
		mustClaim(t, client, newID())
		mu.Lock()
		defer mu.Unlock()
		return used[first.Target] > 0 && used[second.Target] > 0
	}
	servertest.Eventually(t, "both servers are used", both)
	first.Kill()
	for range 20 {
		id := newID()
		mustClaim(t, client, id)
		if _, err := client.Claim(ctx, id); !errors.Is(err, dedup.ErrDuplicate) {
			t.Errorf("with one server: %v", err)
		}
	}
}
