// Loadgen calls a server with a fixed number of callers, checks every answer and prints one JSON object.
//
// Unlike h2load, it claims fresh ids and batches. Callers wait for each answer before the next call.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// callTimeout is about the longest a caller would wait.
const callTimeout = 5 * time.Second

type settings struct {
	target      string
	mode        string
	run         string
	concurrency int
	connections int
	seconds     float64
	batch       int
}

// report is the result of a run. Wrong counts answers a correct server cannot give, Failed failed calls by error text.
// Latencies has the microseconds of every answered call.
type report struct {
	Calls     int            `json:"calls"`
	Seconds   float64        `json:"seconds"`
	Latencies []int64        `json:"latencies_us"`
	Wrong     int            `json:"wrong"`
	FirstBad  string         `json:"first_bad,omitempty"`
	Failed    map[string]int `json:"failed"`
}

func main() {
	var s settings
	flag.StringVar(&s.target, "target", "", "host:port or unix:///path")
	flag.StringVar(&s.mode, "mode", "", "noop, fresh or batch")
	flag.StringVar(&s.run, "run", "", "prefix of the ids; must be new for each run")
	flag.IntVar(&s.concurrency, "concurrency", 1, "number of callers")
	flag.IntVar(&s.connections, "connections", 1, "number of connections the callers share")
	flag.Float64Var(&s.seconds, "seconds", 1, "duration of the run")
	flag.IntVar(&s.batch, "batch", 100, "claims in a batch")
	flag.Parse()
	if err := run(s); err != nil {
		fmt.Fprintln(os.Stderr, "loadgen:", err)
		os.Exit(1)
	}
}

func run(s settings) error {
	connections, err := dial(s.target, s.connections)
	if err != nil {
		return err
	}
	callers := make([]caller, s.concurrency)
	for i := range callers {
		callers[i], err = newCaller(s, connections[i%len(connections)], fmt.Sprintf("%s:%d", s.run, i))
		if err != nil {
			return err
		}
	}
	parts := make([]report, s.concurrency)
	begun := time.Now()
	end := begun.Add(time.Duration(s.seconds * float64(time.Second)))
	var all sync.WaitGroup
	for i := range callers {
		all.Add(1)
		go func() {
			defer all.Done()
			parts[i] = callUntil(end, callers[i])
		}()
	}
	all.Wait()
	total := merge(parts)
	total.Seconds = time.Since(begun).Seconds()
	return json.NewEncoder(os.Stdout).Encode(total)
}

// dial connects in advance, outside the measurement.
func dial(target string, count int) ([]*grpc.ClientConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	var connections []*grpc.ClientConn
	for range count {
		connection, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, err
		}
		connection.Connect()
		for state := connection.GetState(); state.String() != "READY"; state = connection.GetState() {
			if !connection.WaitForStateChange(ctx, state) {
				return nil, fmt.Errorf("no connection to %s after %s", target, callTimeout)
			}
		}
		connections = append(connections, connection)
	}
	return connections, nil
}

func callUntil(end time.Time, next caller) report {
	part := report{Failed: map[string]int{}}
	for begun := time.Now(); begun.Before(end); begun = time.Now() {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		bad, err := next(ctx)
		took := time.Since(begun)
		cancel()
		if err != nil {
			part.Failed[err.Error()]++
			continue
		}
		part.Calls++
		part.Latencies = append(part.Latencies, took.Microseconds())
		if bad != "" {
			part.Wrong++
			part.FirstBad = bad
		}
	}
	return part
}

func merge(parts []report) report {
	total := report{Failed: map[string]int{}, Latencies: []int64{}}
	for _, part := range parts {
		total.Calls += part.Calls
		total.Latencies = append(total.Latencies, part.Latencies...)
		total.Wrong += part.Wrong
		if total.FirstBad == "" {
			total.FirstBad = part.FirstBad
		}
		for status, count := range part.Failed {
			total.Failed[status] += count
		}
	}
	slices.Sort(total.Latencies)
	return total
}
