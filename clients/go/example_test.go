package dedup_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/deduptest"
	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
	"github.com/dedup-service/dedup-service/clients/go/grpcguard"
	"github.com/dedup-service/dedup-service/clients/go/httpguard"
)

func Example() {
	ctx := context.Background()
	target := exampleServer()

	client, err := dedup.New(target) // such as "127.0.0.1:50051" or "unix:///run/dedup/dedup.sock"
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = client.Close() }()

	for range 2 {
		result, err := pay(ctx, client, "431593247")
		fmt.Printf("%s, %v\n", result, err)
	}
	// Output:
	// paid 5, <nil>
	// paid 5, dedup: duplicate transaction, completed
}

func pay(ctx context.Context, guard dedup.Guard, device string) ([]byte, error) {
	id, err := dedup.TransactionID("lucky_box", device, "405", "daily", "2025-11-28")
	if err != nil {
		return nil, err
	}
	claim, err := guard.Claim(ctx, id, dedup.TTL(time.Minute), dedup.Claimant("lucky-box-api"))
	var duplicate *dedup.DuplicateError
	switch {
	case errors.As(err, &duplicate):
		return duplicate.Transaction.Result, err // Answer 409.
	case err != nil:
		return nil, err // Answer 503: this may or may not be a duplicate.
	}
	result, err := []byte("paid 5"), error(nil) // The work.
	if err != nil {
		// Release only if the work certainly had no effect. Otherwise let the claim expire.
		return nil, errors.Join(err, claim.Release(ctx))
	}
	return result, claim.Complete(ctx, result)
}

func ExampleOnUnavailable() {
	ctx := context.Background()
	guard := deduptest.NewGuard(dedup.WithBudget(10 * time.Millisecond))
	guard.Service.SetUnavailable(true)

	claim, err := guard.Claim(ctx, "banner:431593247", dedup.OnUnavailable(dedup.Allow))
	if err == nil && claim.FailOpen {
		fmt.Println("granted without the service: may be a duplicate")
	}
	// Output: granted without the service: may be a duplicate
}

func ExampleWithCoalescing() {
	ctx := context.Background()
	target := exampleServer()

	client, err := dedup.New(target, dedup.WithCoalescing(false))
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	_, err = client.Claim(ctx, "order-1234")
	fmt.Println(err)
	// Output: <nil>
}

func Example_middleware() {
	client := deduptest.NewGuard()
	pay := func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprint(w, "paid 5")
	}

	mux := http.NewServeMux()
	guarded := httpguard.New(client, httpguard.WithCaller(func(r *http.Request) string {
		// No caller receives the response of another.
		return r.Header.Get("X-Account")
	}))
	mux.Handle("POST /pay", guarded(http.HandlerFunc(pay)))

	for range 2 {
		r := httptest.NewRequest(http.MethodPost, "/pay", nil)
		r.Header.Set(httpguard.KeyHeader, "k1")
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		fmt.Printf("%d %s, replayed: %q\n", w.Code, w.Body, w.Header().Get(httpguard.ReplayedHeader))
	}
	// Output:
	// 200 paid 5, replayed: ""
	// 200 paid 5, replayed: "true"
}

func Example_outcome() {
	guarded := httpguard.New(deduptest.NewGuard(),
		httpguard.WithOutcome(func(status int) dedup.Outcome {
			if status == http.StatusPaymentRequired {
				return dedup.Keep
			}
			return httpguard.OutcomeOf(status)
		}),
	)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusPaymentRequired) }))
	for range 2 {
		r := httptest.NewRequest(http.MethodPost, "/pay", nil)
		r.Header.Set(httpguard.KeyHeader, "k1")
		w := httptest.NewRecorder()
		guarded.ServeHTTP(w, r)
		fmt.Println(w.Code)
	}
	// Output:
	// 402
	// 409
}

func ExampleClaim_KeepAlive() {
	fmt.Println(monthlyReport(context.Background(), deduptest.NewGuard()))
	// Output: <nil>
}

func monthlyReport(ctx context.Context, guard dedup.Guard) error {
	claim, err := guard.Claim(ctx, "report:2025-11", dedup.TTL(time.Minute))
	if err != nil {
		return err
	}
	ctx, stop := claim.KeepAlive(ctx, dedup.MaxHold(10*time.Minute))
	defer stop()
	result, err := report(ctx)
	if errors.Is(context.Cause(ctx), dedup.ErrClaimLost) {
		return context.Cause(ctx) // Another caller may do the work.
	}
	if err != nil {
		return err // The effect is unknown: the claim expires.
	}
	return claim.Complete(ctx, result)
}

func report(context.Context) ([]byte, error) { return []byte("reports/2025-11.pdf"), nil }

func Example_loadBalancing() {
	client, err := dedup.New("dns:///dedup:50051", dedup.WithDialOptions(
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"pick_first": {}}]}`),
	), dedup.WithCoalescing(true))
	if err != nil {
		log.Fatal(err)
	}
	_ = client.Close()
	// Output:
}

func Example_correlationID() {
	ctx := context.Background()
	guard := deduptest.NewGuard()

	ctx = metadata.AppendToOutgoingContext(ctx, "x-correlation-id", "click-4711")

	_, err := guard.Claim(ctx, "order-1234")
	fmt.Println(err)
	// Output: <nil>
}

func Example_interceptor() {
	client := deduptest.NewGuard()

	server := grpc.NewServer(grpc.UnaryInterceptor(grpcguard.UnaryServerInterceptor(client)))

	server.Stop()
	// Output:
}

func Example_fake() {
	ctx := context.Background()

	guard := deduptest.NewGuard()
	first, err := guard.Claim(ctx, "order-1234", dedup.TTL(time.Minute))
	fmt.Println(err)
	_, err = guard.Claim(ctx, "order-1234")
	fmt.Println(errors.Is(err, dedup.ErrDuplicate))
	guard.Service.Advance(time.Minute) // The claim expires.
	fmt.Println(errors.Is(first.Complete(ctx, nil), dedup.ErrNotHeld))
	guard.Service.SetUnavailable(true)
	// Output:
	// <nil>
	// true
	// true
}

// exampleServer starts the in-memory service and returns its address. The service runs until the process exits.
func exampleServer() string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer()
	dedupv1.RegisterDedupServiceServer(server, deduptest.NewService())
	go func() { _ = server.Serve(listener) }()
	return listener.Addr().String()
}

// Every Go snippet of the README must be part of an example above.
func TestReadmeSnippetsArePartsOfExamples(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	snippets := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(readme), -1)
	if len(snippets) == 0 {
		t.Fatal("no snippets")
	}
	words := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	for _, snippet := range snippets {
		if !strings.Contains(words(string(source)), words(snippet[1])) {
			t.Errorf("no example has the snippet\n%s", snippet[1])
		}
	}
}
