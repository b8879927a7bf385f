package dedup

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// counting answers batches with nothing, and counts their claims.
type counting struct {
	dedupv1.DedupServiceClient
	sizes []int
}

func (c *counting) BatchClaimTransactions(_ context.Context, r *dedupv1.BatchClaimTransactionsRequest, _ ...grpc.CallOption) (*dedupv1.BatchClaimTransactionsResponse, error) {
	c.sizes = append(c.sizes, len(r.GetRequests()))
	return &dedupv1.BatchClaimTransactionsResponse{Entries: make([]*dedupv1.BatchClaimEntry, len(r.GetRequests()))}, nil
}

// As many as were answered together travel together at once, however long the delay is: nobody else is to come.
func TestABatchLeavesWhenThoseWhoWereAnsweredAreBack(t *testing.T) {
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
			t.Errorf("the batches have the sizes %v", stub.sizes)
		}
	}
}
