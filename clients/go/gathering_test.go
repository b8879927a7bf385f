package dedup

import (
	"context"
	"encoding/json"
	"os"
	"reflect"
	"testing"
	"time"
)

// The rules of clients/golden/coalescing.json, which every client implements.
func TestClaimsAreGatheredByTheContract(t *testing.T) {
	var golden struct {
		Coalescing struct {
			Crowd            int     `json:"crowd"`
			MaxBatch         int     `json:"max_batch"`
			MaxDelayMs       float64 `json:"max_delay_ms"`
			BatchTimeout     string  `json:"batch_timeout_share"`
			FirstPauseMs     float64 `json:"first_pause_ms"`
			LongestPauseMs   float64 `json:"longest_pause_ms"`
			MaxBytesOfAClaim int     `json:"max_claim_bytes"`
		}
		Sequences []struct {
			Name   string
			Events []struct {
				AtMs    float64 `json:"at_ms"`
				Claims  []string
				Ended   *int
				Failed  bool
				Expired bool
				Calls   [][]string
				Alone   []string
			}
		}
	}
	data, err := os.ReadFile("../golden/coalescing.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &golden); err != nil {
		t.Fatal(err)
	}
	rules := golden.Coalescing
	if rules.Crowd != crowd || rules.MaxBatch != maxGathered || ms(rules.MaxDelayMs) != maxGatherDelay || rules.BatchTimeout != "1/4" ||
		batchTimeoutShare != 4 || ms(rules.FirstPauseMs) != firstGatherPause || ms(rules.LongestPauseMs) != maxGatherPause ||
		rules.MaxBytesOfAClaim != maxGatheredBytes {
		t.Errorf("the rules differ: %+v", rules)
	}
	if len(golden.Sequences) == 0 {
		t.Fatal("no sequences")
	}
	for _, sequence := range golden.Sequences {
		t.Run(sequence.Name, func(t *testing.T) {
			var g gathering[string]
			var made []*gatheredCall[string]
			for i, event := range sequence.Events {
				now := ms(event.AtMs)
				var calls [][]string
				var alone []string
				make := func(call *gatheredCall[string]) {
					if call != nil {
						made = append(made, call)
						calls = append(calls, call.claims)
					}
				}
				for _, claim := range event.Claims {
					if g.admits(now) {
						make(g.add(claim))
					} else {
						alone = append(alone, claim)
					}
				}
				switch {
				case event.Ended != nil:
					make(g.ended(made[*event.Ended], event.Failed, now))
				case event.Expired:
					make(g.expired())
				default:
					make(g.settle())
				}
				if !reflect.DeepEqual(calls, event.Calls) || !reflect.DeepEqual(alone, event.Alone) {
					t.Fatalf("event %d: calls %v, alone %v; want %v and %v", i, calls, alone, event.Calls, event.Alone)
				}
			}
		})
	}
}

// The service does not work for a caller that has timed out.
func TestBatchEndsWithTheEarliestAttemptOfItsClaims(t *testing.T) {
	c := newCoalescer(nil, time.Hour)
	early, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	batch, cancel := c.untilAllLeft([]*entry{{ctx: t.Context()}, {ctx: early}})
	defer cancel()
	deadline, _ := batch.Deadline()
	if want, _ := early.Deadline(); !deadline.Equal(want) {
		t.Errorf("the batch ends at %v, the first attempt at %v", deadline, want)
	}
}

func ms(n float64) time.Duration { return time.Duration(n * float64(time.Millisecond)) }
