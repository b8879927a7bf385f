package dedup

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// defaults is clients/defaults.json, which every client implements.
type defaults struct {
	BudgetMS          int64  `json:"budget_ms"`
	AttemptTimeoutMS  int64  `json:"attempt_timeout_ms"`
	FirstBackoffMS    int64  `json:"first_backoff_ms"`
	BackoffMultiplier int64  `json:"backoff_multiplier"`
	LongestBackoffMS  int64  `json:"longest_backoff_ms"`
	Jitter            string `json:"jitter"`
	OnUnavailable     string `json:"on_unavailable"`
	LoggedIDs         []struct {
		TransactionID string `json:"transaction_id"`
		Logged        string `json:"logged"`
	} `json:"logged_ids"`
}

func readDefaults(t *testing.T) defaults {
	t.Helper()
	data, err := os.ReadFile("../defaults.json")
	if err != nil {
		t.Fatal(err)
	}
	var d defaults
	if err := json.Unmarshal(data, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// deadlines records how much time each attempt of a claim has left, and fails the attempt.
type deadlines struct {
	dedupv1.DedupServiceClient
	left []time.Duration
	code codes.Code
}

func (d *deadlines) ClaimTransaction(ctx context.Context, _ *dedupv1.ClaimTransactionRequest, _ ...grpc.CallOption) (*dedupv1.ClaimTransactionResponse, error) {
	deadline, _ := ctx.Deadline()
	d.left = append(d.left, time.Until(deadline))
	return nil, status.Error(d.code, "scripted")
}

func TestDefaultTimeoutsMatchTheSharedFile(t *testing.T) {
	want := readDefaults(t)
	budget := time.Duration(want.BudgetMS) * time.Millisecond
	attempt := time.Duration(want.AttemptTimeoutMS) * time.Millisecond
	for name, test := range map[string]struct {
		client []Option
		call   []CallOption
		want   time.Duration
	}{
		"attempt timeout":           {nil, nil, attempt},
		"attempt timeout with wait": {nil, []CallOption{Wait(time.Minute)}, attempt + time.Minute},
		"budget":                    {[]Option{WithAttemptTimeout(time.Hour)}, nil, budget},
		"budget with wait":          {[]Option{WithAttemptTimeout(time.Hour)}, []CallOption{Wait(time.Minute)}, budget + time.Minute},
	} {
		stub := &deadlines{code: codes.Internal}
		client, err := NewFromStub(stub, test.client...)
		if err != nil {
			t.Fatal(err)
		}
		if claim, err := client.Claim(t.Context(), "x", test.call...); claim != nil || err == nil {
			t.Fatalf("%s: granted %+v, %v", name, claim, err)
		}
		// A busy machine may take some of the time before the stub reads the deadline.
		if len(stub.left) != 1 || stub.left[0] > test.want || stub.left[0] < test.want-attempt/2 {
			t.Errorf("%s: the attempts have %v left, want %v", name, stub.left, test.want)
		}
	}
}

func TestDefaultBackoffMatchesTheSharedFile(t *testing.T) {
	want := readDefaults(t)
	if want.Jitter != "full" {
		t.Fatalf("jitter is %q; this client implements full", want.Jitter)
	}
	client, err := NewFromStub(nil)
	if err != nil {
		t.Fatal(err)
	}
	limit := time.Duration(want.FirstBackoffMS) * time.Millisecond
	for n := 1; n <= 40; n++ {
		var shortest, longest time.Duration = time.Hour, 0
		for range 1000 {
			pause := client.jitter(n)
			shortest, longest = min(shortest, pause), max(longest, pause)
		}
		if shortest < 0 || shortest > limit/10 || longest > limit || longest < limit*9/10 {
			t.Errorf("after attempt %d the pauses are %v to %v, want 0 to %v", n, shortest, longest, limit)
		}
		limit = min(limit*time.Duration(want.BackoffMultiplier), time.Duration(want.LongestBackoffMS)*time.Millisecond)
	}
}

func TestDefaultPolicyMatchesTheSharedFile(t *testing.T) {
	policies := map[string]Policy{"deny": Deny, "allow": Allow}
	want, known := policies[readDefaults(t).OnUnavailable]
	if !known {
		t.Fatalf("on_unavailable is unknown: %+v", readDefaults(t))
	}
	client, err := NewFromStub(&deadlines{code: codes.Unavailable}, WithBudget(10*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	if claim, _ := client.Claim(t.Context(), "x"); (claim != nil) != (want == Allow) {
		t.Errorf("claim while unavailable: %+v, want policy %d", claim, want)
	}
}

func TestLoggedIDsMatchTheSharedFile(t *testing.T) {
	vectors := readDefaults(t).LoggedIDs
	if len(vectors) == 0 {
		t.Fatal("no vectors")
	}
	for _, vector := range vectors {
		if got := hashed(vector.TransactionID); got != vector.Logged || strings.Contains(got, vector.TransactionID) {
			t.Errorf("%q is logged as %q, want %q", vector.TransactionID, got, vector.Logged)
		}
	}
}
