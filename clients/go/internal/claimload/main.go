// Command claimload claims fresh transactions from many goroutines, through the plain stub or the client with or without
// coalescing. It prints one line of JSON with the number of claims, the duration and the latencies.
// benchmarks/coalescing.py runs it.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// timeout outlasts a stall of a busy machine.
const timeout = 10 * time.Second

type round struct {
	Claims  int     `json:"claims"`
	Seconds float64 `json:"seconds"`
	P50Ms   float64 `json:"p50_ms"`
	P99Ms   float64 `json:"p99_ms"`
}

func main() {
	target := flag.String("target", "", "address of the service")
	callers := flag.Int("callers", 64, "number of claiming goroutines")
	seconds := flag.Float64("seconds", 2, "duration of the measurement, after a warm-up of a tenth of it")
	prefix := flag.String("prefix", "", "prefix of every transaction id; must be new for each run")
	kind := flag.String("kind", "adaptive", "plain (the generated stub), unary or adaptive (the client)")
	flag.Parse()
	result, err := run(*target, *callers, time.Duration(*seconds*float64(time.Second)), *prefix, *kind)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(result)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "claimload:", err)
		os.Exit(1)
	}
}

func run(target string, callers int, measured time.Duration, prefix, kind string) (*round, error) {
	claimer, closer, err := claimerOf(target, kind)
	if err != nil {
		return nil, err
	}
	defer func() { _ = closer.Close() }()
	if err := claimer(context.Background(), prefix); err != nil { // Connect.
		return nil, err
	}
	begin := time.Now().Add(measured / 10)
	end := begin.Add(measured)
	latencies := make([][]time.Duration, callers)
	errs := make([]error, callers)
	var group sync.WaitGroup
	for caller := range callers {
		group.Add(1)
		go func() {
			defer group.Done()
			latencies[caller], errs[caller] = claim(claimer, fmt.Sprintf("%s:%d", prefix, caller), begin, end)
		}()
	}
	group.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	all := slices.Concat(latencies...)
	if len(all) == 0 {
		return nil, errors.New("no claim was answered during the measurement")
	}
	slices.SortFunc(all, cmp.Compare[time.Duration])
	quantile := func(q float64) float64 { return float64(all[int(q*float64(len(all)-1))]) / float64(time.Millisecond) }
	return &round{Claims: len(all), Seconds: measured.Seconds(), P50Ms: quantile(0.5), P99Ms: quantile(0.99)}, nil
}

// claimer claims a fresh id. It fails if the claim is not granted as fresh.
type claimer func(ctx context.Context, id string) error

func claimerOf(target, kind string) (claimer, io.Closer, error) {
	switch kind {
	case "plain":
		conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, err
		}
		return plain(dedupv1.NewDedupServiceClient(conn)), conn, nil
	case "unary", "adaptive":
		client, err := dedup.New(target, dedup.WithBudget(timeout), dedup.WithCoalescing(kind == "adaptive"))
		if err != nil {
			return nil, nil, err
		}
		return guarded(client), client, nil
	default:
		return nil, nil, fmt.Errorf("the kind is %q; it must be plain, unary or adaptive", kind)
	}
}

func guarded(client *dedup.Client) claimer {
	return func(ctx context.Context, id string) error {
		claim, err := client.Claim(ctx, id)
		if err == nil && (claim.ShadowDuplicate || claim.Transaction.ID != id) {
			err = fmt.Errorf("a fresh claim of %s was answered with %+v", id, claim.Transaction)
		}
		return err
	}
}

// plain claims as a program without the client would: with a token and a deadline.
func plain(stub dedupv1.DedupServiceClient) claimer {
	return func(ctx context.Context, id string) error {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		reply, err := stub.ClaimTransaction(ctx, &dedupv1.ClaimTransactionRequest{TransactionId: id, ClaimToken: rand.Text()})
		if err != nil {
			return err
		}
		if reply.GetOutcome() == dedupv1.ClaimOutcome_CLAIM_OUTCOME_DUPLICATE {
			return dedup.ErrDuplicate
		}
		if reply.GetOutcome() != dedupv1.ClaimOutcome_CLAIM_OUTCOME_CLAIMED || reply.GetReplayed() || reply.GetTransaction().GetTransactionId() != id {
			return fmt.Errorf("a fresh claim of %s was answered with %v", id, reply.GetOutcome())
		}
		return nil
	}
}

// claim claims fresh ids one at a time and returns the latencies of those answered between begin and end. It fails if a
// second claim of the last id is not a duplicate.
func claim(claim claimer, prefix string, begin, end time.Time) ([]time.Duration, error) {
	ctx := context.Background()
	var latencies []time.Duration
	for n := 0; ; n++ {
		id := fmt.Sprintf("%s:%d", prefix, n)
		sent := time.Now()
		err := claim(ctx, id)
		answered := time.Now()
		if err != nil {
			return nil, err
		}
		if answered.After(end) {
			if err := claim(ctx, id); !errors.Is(err, dedup.ErrDuplicate) {
				return nil, fmt.Errorf("a second claim of %s was not a duplicate: %w", id, err)
			}
			return latencies, nil
		}
		if answered.After(begin) {
			latencies = append(latencies, answered.Sub(sent))
		}
	}
}
