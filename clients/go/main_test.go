package dedup_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/deduptest"
	"github.com/dedup-service/dedup-service/clients/go/internal/servertest"
)

// shared holds the servers of all tests of this package, because starting one takes longer than most tests.
var shared struct {
	folder            string
	redis             *servertest.Redis
	embedded, onRedis servertest.Shared
}

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	folder, err := os.MkdirTemp("", "dedup-go")
	if err != nil {
		panic(err)
	}
	shared.folder = folder
	defer func() {
		shared.embedded.Kill()
		shared.onRedis.Kill()
		if shared.redis != nil {
			shared.redis.Kill()
		}
		_ = os.RemoveAll(folder)
	}()
	return m.Run()
}

// embeddedServer returns the real service with its embedded store.
func embeddedServer(t *testing.T) *servertest.Server {
	t.Helper()
	return shared.embedded.Get(t, func() (string, error) {
		return "sqlite:///" + filepath.Join(shared.folder, "claims.db"), nil
	})
}

// redisServer returns the real service with a real Redis.
func redisServer(t *testing.T) *servertest.Server {
	t.Helper()
	servertest.RequireRedis(t)
	return shared.onRedis.Get(t, func() (url string, err error) {
		if shared.redis, err = servertest.LaunchRedis(shared.folder); err != nil {
			return "", err
		}
		return shared.redis.URL, nil
	})
}

// newClient returns a client whose budget is long enough for a busy machine.
func newClient(t *testing.T, target string, opts ...dedup.Option) *dedup.Client {
	t.Helper()
	client, err := dedup.New(target, append([]dedup.Option{dedup.WithBudget(20 * time.Second), dedup.WithAttemptTimeout(10 * time.Second)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// onEach runs a test against the fake, against the service with each store, and without coalescing.
func onEach(t *testing.T, test func(*testing.T, dedup.Guard)) {
	t.Run("fake", func(t *testing.T) { test(t, deduptest.NewGuard()) })
	t.Run("embedded", func(t *testing.T) { test(t, newClient(t, embeddedServer(t).Target)) })
	t.Run("redis", func(t *testing.T) { test(t, newClient(t, redisServer(t).Target)) })
	t.Run("without coalescing", func(t *testing.T) {
		test(t, newClient(t, embeddedServer(t).Target, dedup.WithCoalescing(false)))
	})
}

var lastID atomic.Int64

// newID returns a unique id.
func newID() string {
	return fmt.Sprintf("test:%d", lastID.Add(1))
}

func mustClaim(t *testing.T, guard dedup.Guard, id string, opts ...dedup.CallOption) *dedup.Claim {
	t.Helper()
	claim, err := guard.Claim(context.Background(), id, opts...)
	if err != nil {
		t.Fatalf("Claim: %v", err)
	}
	return claim
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
