package dedup

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// counting answers batches with empty entries and records their sizes.
type counting struct {
	dedupv1.DedupServiceClient
	sizes []int
}

func (c *counting) BatchClaimTransactions(_ context.Context, r *dedupv1.BatchClaimTransactionsRequest, _ ...grpc.CallOption) (*dedupv1.BatchClaimTransactionsResponse, error) {
	c.sizes = append(c.sizes, len(r.GetRequests()))
	return &dedupv1.BatchClaimTransactionsResponse{Entries: make([]*dedupv1.BatchClaimEntry, len(r.GetRequests()))}, nil
}

// Once all callers of the last batch are back, the next batch is sent without the delay.
func TestBatchIsSentOnceAllAnsweredCallersAreBack(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	stub := &counting{}
	c := &coalescer{stub: stub, maxBatch: 8, maxDelay: time.Hour, expected: 2}
	for range 3 {
		errs := make(chan error)
		for range 2 {
			go func() {
				_, err := c.claim(ctx, &dedupv1.ClaimTransactionRequest{})
				errs <- err
			}()
		}
		for range 2 {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, size := range stub.sizes {
		if size != 2 {
			t.Errorf("batch sizes are %v, want 2 each", stub.sizes)
		}
	}
}
