package dedup

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// coalescer sends concurrent claims in batches, without a goroutine between batches.
type coalescer struct {
	stub     dedupv1.DedupServiceClient
	maxBatch int
	maxDelay time.Duration

	mu      sync.Mutex
	pending []*entry
	timer   *time.Timer // sends the pending claims; nil if there are none

	batches  int // in flight
	claims   int // in those batches
	expected int // claims pending or in flight when the last batch was answered; maxBatch at first
}

// entry is a claim of a batch. Its caller may leave early.
type entry struct {
	ctx     context.Context
	request *dedupv1.ClaimTransactionRequest
	answer  chan answer // has room for one, so send never blocks on a caller that has left
}

type answer struct {
	reply *dedupv1.ClaimTransactionResponse
	err   error
}

// claim sends the request in a batch. It returns the request's answer, or an error if its context ends first.
func (c *coalescer) claim(ctx context.Context, request *dedupv1.ClaimTransactionRequest) (*dedupv1.ClaimTransactionResponse, error) {
	e := &entry{ctx: ctx, request: request, answer: make(chan answer, 1)}
	c.add(e)
	select {
	case a := <-e.answer:
		return a.reply, a.err
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

func (c *coalescer) add(e *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending = append(c.pending, e)
	// Callers answered together usually claim again together: once all are back, do not wait for more.
	allBack := c.batches == 0 && len(c.pending) >= c.expected
	if len(c.pending) >= c.maxBatch || allBack {
		go c.send(c.take())
	} else if c.timer == nil {
		c.timer = time.AfterFunc(c.maxDelay, c.flush)
	}
}

func (c *coalescer) flush() {
	c.mu.Lock()
	batch := c.take()
	c.mu.Unlock()
	c.send(batch)
}

// take removes and returns the pending claims; the lock is held. A fired timer sends the next batch early.
func (c *coalescer) take() []*entry {
	batch := c.pending
	c.pending = nil
	if len(batch) > 0 {
		c.batches++
		c.claims += len(batch)
	}
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	return batch
}

// send sends a batch and distributes the answers.
func (c *coalescer) send(batch []*entry) {
	if len(batch) == 0 {
		return
	}
	// Skip callers that have left: nobody would hold their claims.
	present := make([]*entry, 0, len(batch))
	for _, e := range batch {
		if e.ctx.Err() == nil {
			present = append(present, e)
		}
	}
	if len(present) == 0 {
		c.answered(len(batch))
		return
	}
	ctx, cancel := untilAllLeft(present)
	defer cancel()
	request := &dedupv1.BatchClaimTransactionsRequest{Requests: make([]*dedupv1.ClaimTransactionRequest, len(present))}
	for i, e := range present {
		request.Requests[i] = e.request
	}
	reply, err := c.stub.BatchClaimTransactions(ctx, request)
	c.answered(len(batch))
	if err == nil && len(reply.GetEntries()) != len(present) {
		err = status.Error(codes.Internal, "the service answered a batch with a wrong number of entries")
	}
	for i, e := range present {
		if err != nil {
			e.answer <- answer{err: err}
			continue
		}
		switch result := reply.GetEntries()[i].GetResult().(type) {
		case *dedupv1.BatchClaimEntry_Response:
			e.answer <- answer{reply: result.Response}
		case *dedupv1.BatchClaimEntry_Error:
			e.answer <- answer{err: status.ErrorProto(result.Error)}
		default: // An empty entry has no outcome, which is an error.
			e.answer <- answer{reply: &dedupv1.ClaimTransactionResponse{}}
		}
	}
}

// answered records the end of a batch before its callers return.
func (c *coalescer) answered(claims int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expected = c.claims + len(c.pending)
	c.batches--
	c.claims -= claims
}

// untilAllLeft returns a context that ends once no caller waits for the batch.
func untilAllLeft(entries []*entry) (context.Context, context.CancelFunc) {
	var latest time.Time
	for _, e := range entries {
		// Every attempt has a deadline.
		if deadline, ok := e.ctx.Deadline(); ok && deadline.After(latest) {
			latest = deadline
		}
	}
	ctx, cancel := context.WithDeadline(context.Background(), latest)
	var mu sync.Mutex
	waiting := len(entries)
	stops := make([]func() bool, len(entries))
	for i, e := range entries {
		stops[i] = context.AfterFunc(e.ctx, func() {
			mu.Lock()
			defer mu.Unlock()
			if waiting--; waiting == 0 {
				cancel()
			}
		})
	}
	return ctx, func() {
		for _, stop := range stops {
			stop()
		}
		cancel()
	}
}
