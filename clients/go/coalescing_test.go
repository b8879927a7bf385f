package dedup_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// batches is a service that answers batches with the functions of a test.
type batches struct {
	dedupv1.DedupServiceClient

	mu     sync.Mutex
	sizes  []int
	tokens map[string][]string // by transaction id
	answer func(ctx context.Context, r *dedupv1.ClaimTransactionRequest, attempt int) (*dedupv1.ClaimTransactionResponse, error)
	before func(ctx context.Context) error
}

func (b *batches) BatchClaimTransactions(ctx context.Context, r *dedupv1.BatchClaimTransactionsRequest, _ ...grpc.CallOption) (*dedupv1.BatchClaimTransactionsResponse, error) {
	if b.before != nil {
		if err := b.before(ctx); err != nil {
			return nil, err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sizes = append(b.sizes, len(r.GetRequests()))
	if b.tokens == nil {
		b.tokens = map[string][]string{}
	}
	reply := &dedupv1.BatchClaimTransactionsResponse{}
	for _, request := range r.GetRequests() {
		id := request.GetTransactionId()
		b.tokens[id] = append(b.tokens[id], request.GetClaimToken())
		claim, err := b.answer(ctx, request, len(b.tokens[id]))
		entry := &dedupv1.BatchClaimEntry{Result: &dedupv1.BatchClaimEntry_Response{Response: claim}}
		if err != nil {
			entry.Result = &dedupv1.BatchClaimEntry_Error{Error: status.Convert(err).Proto()}
		}
		reply.Entries = append(reply.Entries, entry)
	}
	return reply, nil
}

// ReleaseTransaction reports that nothing is held.
func (*batches) ReleaseTransaction(context.Context, *dedupv1.ReleaseTransactionRequest, ...grpc.CallOption) (*dedupv1.ReleaseTransactionResponse, error) {
	return &dedupv1.ReleaseTransactionResponse{Outcome: dedupv1.ReleaseOutcome_RELEASE_OUTCOME_NOT_HELD}, nil
}

func coalescing(t *testing.T, b *batches, maxBatch int, maxDelay time.Duration) *dedup.Client {
	t.Helper()
	client, err := dedup.NewFromStub(b, dedup.WithCoalescing(maxBatch, maxDelay),
		dedup.WithBudget(20*time.Second), dedup.WithBackoff(time.Microsecond, time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func TestEachClaimOfABatchHasItsOwnAnswerAndToken(t *testing.T) {
	b := &batches{answer: func(_ context.Context, r *dedupv1.ClaimTransactionRequest, attempt int) (*dedupv1.ClaimTransactionResponse, error) {
		switch r.GetTransactionId() {
		case "duplicate":
			return &dedupv1.ClaimTransactionResponse{Outcome: dedupv1.ClaimOutcome_CLAIM_OUTCOME_DUPLICATE}, nil
		case "damaged":
			return nil, serviceError(codes.FailedPrecondition, "VALUE_DAMAGED", "no")
		case "lost":
			if attempt < 3 {
				return nil, serviceError(codes.Unavailable, "STORE_TIMEOUT", "unknown", 0)
			}
		case "silent":
			return nil, nil
		}
		return granted()
	}}
	client := coalescing(t, b, 8, 10*time.Millisecond)
	ids := []string{"duplicate", "damaged", "lost", "silent", "good"}
	errs := claimAll(client, ids)
	if !errors.Is(errs["duplicate"], dedup.ErrDuplicate) || errors.Is(errs["duplicate"], dedup.ErrUnavailable) {
		t.Errorf("duplicate: %v", errs["duplicate"])
	}
	if status.Code(errs["damaged"]) != codes.FailedPrecondition {
		t.Errorf("damaged: %v", errs["damaged"])
	}
	if !errors.Is(errs["silent"], dedup.ErrUnavailable) {
		t.Errorf("silent: %v", errs["silent"])
	}
	if errs["lost"] != nil || errs["good"] != nil {
		t.Errorf("lost: %v, good: %v", errs["lost"], errs["good"])
	}
	if got := b.tokens["lost"]; len(got) != 3 || got[0] != got[1] || got[1] != got[2] {
		t.Errorf("the retries have the tokens %q", got)
	}
	distinct := map[string]bool{}
	for _, id := range ids {
		distinct[b.tokens[id][0]] = true
	}
	if len(distinct) != len(ids) {
		t.Errorf("claims share tokens: %v", b.tokens)
	}
}

func TestFullBatchIsSentAtOnce(t *testing.T) {
	const n = 5
	b := &batches{answer: grantAll}
	var ids []string
	for i := range 2 * n {
		ids = append(ids, fmt.Sprint(i))
	}
	for id, err := range claimAll(coalescing(t, b, n, time.Hour), ids) {
		if err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
	if len(b.sizes) != 2 || b.sizes[0] != n || b.sizes[1] != n {
		t.Errorf("batches of %v, want two of %d", b.sizes, n)
	}
}

func TestCancelledClaimDoesNotCancelTheOthersOfItsBatch(t *testing.T) {
	sent, proceed := make(chan struct{}), make(chan struct{})
	b := &batches{answer: grantAll, before: func(ctx context.Context) error {
		close(sent)
		select {
		case <-proceed:
			return nil
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}}
	client := coalescing(t, b, 2, time.Hour)
	stays := make(chan error, 1)
	go func() {
		_, err := client.Claim(ctx, "stays")
		stays <- err
	}()
	leaving, leave := context.WithCancel(ctx)
	leaves := make(chan error, 1)
	go func() {
		_, err := client.Claim(leaving, "leaves")
		leaves <- err
	}()
	<-sent
	leave()
	if err := <-leaves; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled claim: %v", err)
	}
	close(proceed)
	if err := <-stays; err != nil {
		t.Errorf("other claim: %v", err)
	}
}

func TestBatchIsCancelledOnceAllItsClaimsAre(t *testing.T) {
	sent, ended := make(chan struct{}), make(chan struct{})
	b := &batches{answer: grantAll, before: func(ctx context.Context) error {
		close(sent)
		<-ctx.Done()
		close(ended)
		return status.FromContextError(ctx.Err()).Err()
	}}
	leaving, leave := context.WithCancel(ctx)
	go func() {
		<-sent
		leave()
	}()
	if _, err := coalescing(t, b, 1, 0).Claim(leaving, "x"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	<-ended
}

func TestClaimCancelledBeforeItsBatchIsNotSent(t *testing.T) {
	b := &batches{answer: grantAll}
	client := coalescing(t, b, 2, time.Hour)
	gone, leave := context.WithCancel(ctx)
	leave()
	if _, err := client.Claim(gone, "gone"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	mustClaim(t, client, "stays")
	if len(b.tokens["gone"]) != 0 || len(b.tokens["stays"]) != 1 {
		t.Errorf("sent: %v", b.tokens)
	}
}

func TestInvalidUTF8FailsOnlyItsOwnClaim(t *testing.T) {
	client := newClient(t, embeddedServer(t).Target, dedup.WithCoalescing(2, 10*time.Millisecond))
	good, bad := newID(), "\xff"
	errs := claimAll(client, []string{good, bad})
	if errs[good] != nil || status.Code(errs[bad]) != codes.InvalidArgument {
		t.Errorf("good: %v, bad: %v", errs[good], errs[bad])
	}
}

func TestBatchWithTooFewAnswersFailsAllItsClaims(t *testing.T) {
	short := &shortAnswers{}
	client, err := dedup.NewFromStub(short, dedup.WithCoalescing(2, time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	for id, err := range claimAll(client, []string{"a", "b"}) {
		if status.Code(err) != codes.Internal {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// shortAnswers answers only the first claim of a batch.
type shortAnswers struct{ dedupv1.DedupServiceClient }

func (*shortAnswers) BatchClaimTransactions(context.Context, *dedupv1.BatchClaimTransactionsRequest, ...grpc.CallOption) (*dedupv1.BatchClaimTransactionsResponse, error) {
	claim, _ := granted()
	return &dedupv1.BatchClaimTransactionsResponse{Entries: []*dedupv1.BatchClaimEntry{
		{Result: &dedupv1.BatchClaimEntry_Response{Response: claim}},
	}}, nil
}

func grantAll(context.Context, *dedupv1.ClaimTransactionRequest, int) (*dedupv1.ClaimTransactionResponse, error) {
	return granted()
}

// claimAll claims the ids concurrently and returns the error of each.
func claimAll(guard dedup.Guard, ids []string) map[string]error {
	var mu sync.Mutex
	errs := map[string]error{}
	var all sync.WaitGroup
	for _, id := range ids {
		all.Add(1)
		go func() {
			defer all.Done()
			_, err := guard.Claim(ctx, id)
			mu.Lock()
			defer mu.Unlock()
			errs[id] = err
		}()
	}
	all.Wait()
	return errs
}
