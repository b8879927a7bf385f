package dedup_test

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/internal/servertest"
)

// held waits until the server holds the transaction. direct bypasses the proxy.
func held(t *testing.T, direct dedup.Guard, id string) {
	t.Helper()
	servertest.Eventually(t, "the server holds "+id, func() bool {
		_, err := direct.Get(ctx, id)
		return err == nil
	})
}

// onEachStore runs a test against the service on each store.
func onEachStore(t *testing.T, test func(*testing.T, *servertest.Server)) {
	t.Run("embedded", func(t *testing.T) { test(t, embeddedServer(t)) })
	t.Run("redis", func(t *testing.T) { test(t, redisServer(t)) })
}

func TestRetryAfterALostReplyGetsTheClaim(t *testing.T) {
	onEachStore(t, func(t *testing.T, server *servertest.Server) {
		for name, opts := range map[string][]dedup.Option{
			"coalescing": nil,
			"alone":      {dedup.WithCoalescing(false)},
		} {
			t.Run(name, func(t *testing.T) {
				proxy := servertest.StartProxy(t, server.Target)
				client := newClient(t, proxy.Target, opts...)
				direct := newClient(t, server.Target)
				mustClaim(t, client, newID()) // Connect.

				id := newID()
				proxy.SwallowReplies(true)
				answer := make(chan *dedup.Claim, 1)
				failure := make(chan error, 1)
				go func() {
					claim, err := client.Claim(ctx, id)
					answer <- claim
					failure <- err
				}()
				held(t, direct, id)
				// The claim is made and its reply is lost. Close this connection; the next one works.
				proxy.SwallowReplies(false)
				proxy.Cut()
				claim, err := <-answer, <-failure
				if err != nil || !claim.Replayed {
					t.Fatalf("the retry: %+v, %v", claim, err)
				}
				if _, err := direct.Claim(ctx, id); !errors.Is(err, dedup.ErrDuplicate) {
					t.Errorf("another caller: %v", err)
				}
				if err := claim.Complete(ctx, []byte("paid 5")); err != nil {
					t.Errorf("the claim is not held: %v", err)
				}
			})
		}
	})
}

func TestTimedOutAttemptIsRetried(t *testing.T) {
	server := embeddedServer(t)
	proxy := servertest.StartProxy(t, server.Target)
	var attempts atomic.Int32
	client := newClient(t, proxy.Target, dedup.WithAttemptTimeout(100*time.Millisecond),
		dedup.WithDialOptions(grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any,
			conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			attempts.Add(1)
			return invoke(ctx, method, req, reply, conn, opts...)
		})))
	direct := newClient(t, server.Target)
	mustClaim(t, client, newID()) // Connect.
	attempts.Store(0)

	id := newID()
	proxy.SwallowReplies(true)
	answer := make(chan *dedup.Claim, 1)
	go func() {
		claim, err := client.Claim(ctx, id)
		if err != nil {
			t.Errorf("the retry: %v", err)
		}
		answer <- claim
	}()
	held(t, direct, id)
	servertest.Eventually(t, "a second attempt", func() bool { return attempts.Load() > 1 })
	proxy.SwallowReplies(false)
	proxy.Cut() // The connection lost bytes and is unusable.
	if claim := <-answer; claim != nil && !claim.Replayed {
		t.Errorf("the retry: %+v", claim)
	}
	if _, err := direct.Claim(ctx, id); !errors.Is(err, dedup.ErrDuplicate) {
		t.Errorf("another caller: %v", err)
	}
}

func TestRetryAfterALostReplyCompletesAndReleases(t *testing.T) {
	onEachStore(t, func(t *testing.T, server *servertest.Server) {
		proxy := servertest.StartProxy(t, server.Target)
		client := newClient(t, proxy.Target)
		direct := newClient(t, server.Target)
		for name, end := range map[string]struct {
			work    func(*dedup.Claim) error
			arrived func(*dedup.Transaction, error) bool
		}{
			"complete": {
				func(c *dedup.Claim) error { return c.Complete(ctx, []byte("paid 5")) },
				func(t *dedup.Transaction, err error) bool { return err == nil && t.State == dedup.StateCompleted },
			},
			"release": {
				func(c *dedup.Claim) error { return c.Release(ctx) },
				func(_ *dedup.Transaction, err error) bool { return errors.Is(err, dedup.ErrNotFound) },
			},
		} {
			id := newID()
			claim := mustClaim(t, client, id)
			proxy.SwallowReplies(true)
			answer := make(chan error, 1)
			go func() { answer <- end.work(claim) }()
			servertest.Eventually(t, name+" arrives", func() bool { return end.arrived(direct.Get(ctx, id)) })
			proxy.SwallowReplies(false)
			proxy.Cut()
			if err := <-answer; err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

func TestKilledAndReplacedServerLosesNoClaim(t *testing.T) {
	url := "sqlite:///" + filepath.Join(t.TempDir(), "claims.db")
	first := servertest.Start(t, url)
	proxy := servertest.StartProxy(t, first.Target)
	client := newClient(t, proxy.Target, dedup.WithBudget(time.Minute), dedup.WithAttemptTimeout(time.Second))

	const ids, callers = 100, 3
	var claimed [ids]atomic.Int32
	var answered atomic.Int32
	replaced := make(chan struct{})
	var all sync.WaitGroup
	for range callers {
		all.Add(1)
		go func() {
			defer all.Done()
			for i := range ids {
				if i == ids/2 {
					<-replaced // Leaves work for the second server.
				}
				_, err := client.Claim(ctx, newIDFor(t, i))
				answered.Add(1)
				switch {
				case err == nil:
					claimed[i].Add(1)
				case !errors.Is(err, dedup.ErrDuplicate):
					t.Errorf("claim %d: %v", i, err)
				}
			}
		}()
	}
	servertest.Eventually(t, "some claims are answered", func() bool { return answered.Load() > ids/10 })
	first.Kill()
	proxy.SetUpstream(servertest.Start(t, url).Target)
	close(replaced)
	all.Wait()
	for i := range claimed {
		if got := claimed[i].Load(); got != 1 {
			t.Errorf("transaction %d was claimed %d times", i, got)
		}
	}
}

func newIDFor(t *testing.T, i int) string {
	id, err := dedup.TransactionID(t.Name(), string(rune('0'+i/10)), string(rune('0'+i%10)))
	if err != nil {
		t.Error(err)
	}
	return id
}

func TestUnreachableServerIsUnavailable(t *testing.T) {
	server := servertest.Start(t, "sqlite:///"+filepath.Join(t.TempDir(), "claims.db"))
	proxy := servertest.StartProxy(t, server.Target)
	server.Kill()
	client := newClient(t, proxy.Target, dedup.WithBudget(300*time.Millisecond))
	_, err := client.Claim(ctx, newID())
	var e *dedup.Error
	if !errors.Is(err, dedup.ErrUnavailable) || !errors.As(err, &e) || e.Applied != dedup.AppliedNo {
		t.Errorf("denied: %v", err)
	}
	if claim := mustClaim(t, client, newID(), dedup.OnUnavailable(dedup.Allow)); !claim.FailOpen {
		t.Errorf("allowed: %+v", claim)
	}
}

func TestShadowDuplicateIsGranted(t *testing.T) {
	folder := t.TempDir()
	policy := filepath.Join(folder, "policy.toml")
	writeFile(t, policy, "[namespaces.trial]\nmode = \"shadow\"\n")
	server := servertest.Start(t, "sqlite:///"+filepath.Join(folder, "claims.db"), "--policy-file", policy)
	client := newClient(t, server.Target, dedup.WithDefaults(dedup.Namespace("trial")))
	id := newID()
	mustClaim(t, client, id, dedup.Claimant("anna"))
	second := mustClaim(t, client, id)
	if !second.ShadowDuplicate || second.Transaction.Claimant != "anna" {
		t.Errorf("second: %+v", second)
	}
	if err := second.Complete(ctx, []byte("paid 5")); err != nil {
		t.Errorf("completion: %v", err)
	}
}

func TestUnixSocket(t *testing.T) {
	// t.TempDir() may exceed the length limit of a socket path.
	path := filepath.Join(shared.folder, "s")
	server := servertest.Start(t, "sqlite:///"+filepath.Join(t.TempDir(), "claims.db"), "--listen", "unix://"+path)
	client := newClient(t, "unix://"+path)
	mustClaim(t, client, newID())
	if server.Target == "" {
		t.Error("no target")
	}
}
