// Command claimload claims fresh transactions from many goroutines, alone or coalesced. It prints one line of JSON with
// the number of claims, the duration and the latencies. benchmarks/coalescing.py runs it.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	dedup "github.com/dedup-service/dedup-service/clients/go"
)

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
	coalesce := flag.Bool("coalesce", false, "coalesce claims")
	maxDelay := flag.Duration("max-delay", time.Millisecond, "longest wait of a claim for others")
	flag.Parse()
	result, err := run(*target, *callers, time.Duration(*seconds*float64(time.Second)), *prefix, *coalesce, *maxDelay)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(result)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "claimload:", err)
		os.Exit(1)
	}
}

func run(target string, callers int, measured time.Duration, prefix string, coalesce bool, maxDelay time.Duration) (*round, error) {
	var options []dedup.Option
	if coalesce {
		options = append(options, dedup.WithCoalescing(1000, maxDelay))
	}
	client, err := dedup.New(target, options...)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	begin := time.Now().Add(measured / 10)
	end := begin.Add(measured)
	latencies := make([][]time.Duration, callers)
	errs := make([]error, callers)
	var group sync.WaitGroup
	for caller := range callers {
		group.Add(1)
		go func() {
			defer group.Done()
			latencies[caller], errs[caller] = claim(client, fmt.Sprintf("%s:%d", prefix, caller), begin, end)
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

// claim claims fresh ids one at a time and returns the latencies of those answered between begin and end. It fails if a
// claim is not granted as fresh, or if a second claim of the last id is not a duplicate.
func claim(client *dedup.Client, prefix string, begin, end time.Time) ([]time.Duration, error) {
	ctx := context.Background()
	var latencies []time.Duration
	for n := 0; ; n++ {
		id := fmt.Sprintf("%s:%d", prefix, n)
		sent := time.Now()
		claim, err := client.Claim(ctx, id)
		answered := time.Now()
		if err != nil {
			return nil, err
		}
		if claim.Replayed || claim.ShadowDuplicate || claim.Transaction.ID != id {
			return nil, fmt.Errorf("a fresh claim of %s was answered with %+v", id, claim.Transaction)
		}
		if answered.After(end) {
			if _, err := client.Claim(ctx, id); !errors.Is(err, dedup.ErrDuplicate) {
				return nil, fmt.Errorf("a second claim of %s was not a duplicate: %w", id, err)
			}
			return latencies, nil
		}
		if answered.After(begin) {
			latencies = append(latencies, answered.Sub(sent))
		}
	}
}
