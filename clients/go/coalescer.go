package dedup

import (
	"context"
	"runtime"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// coalescer sends claims that find another in flight in batches, without a goroutine between batches.
type coalescer struct {
	stub    dedupv1.DedupServiceClient
	timeout time.Duration // of a batch
	delay   time.Duration // the longest wait of a claim
	begun   time.Time     // the moment from which gathering counts

	mu       sync.Mutex
	gathered gathering[*entry]
	settling bool        // a caller is about to settle
	timer    *time.Timer // ends the wait of the gathered claims; nil if none wait
}

func newCoalescer(stub dedupv1.DedupServiceClient, attemptTimeout time.Duration) *coalescer {
	return &coalescer{stub: stub, timeout: attemptTimeout / batchTimeoutShare, delay: maxGatherDelay, begun: time.Now()}
}

// entry is a gathered claim. Its caller may leave early.
type entry struct {
	ctx     context.Context
	request *dedupv1.ClaimTransactionRequest
	answer  chan answer // has room for one, so sending never blocks on a caller that has left
	sent    bool        // guarded by the coalescer's lock
}

// answer ends the wait of a claim: with the reply or error of its batch, or with the request to send it alone.
type answer struct {
	reply *dedupv1.ClaimTransactionResponse
	err   error
	alone *gatheredCall[*entry] // the call, if it has one claim
	again bool                  // the batch failed: send the claim alone
}

// claim makes one attempt of a claim.
func (c *coalescer) claim(ctx context.Context, request *dedupv1.ClaimTransactionRequest) (*dedupv1.ClaimTransactionResponse, error) {
	if !c.mayGather(ctx, request) {
		return c.stub.ClaimTransaction(ctx, request)
	}
	e := &entry{ctx: ctx, request: request, answer: make(chan answer, 1)}
	if !c.add(e) {
		return c.stub.ClaimTransaction(ctx, request)
	}
	var a answer
	select {
	case a = <-e.answer:
	case <-ctx.Done():
		if c.leave(e) {
			return nil, &unsentError{status.FromContextError(ctx.Err()).Err()}
		}
		// The answer may have arrived at the same moment.
		select {
		case a = <-e.answer:
		default:
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	switch {
	case a.alone != nil:
		defer c.ended(a.alone, false)
		return c.stub.ClaimTransaction(ctx, request)
	case a.again:
		reply, err := c.stub.ClaimTransaction(ctx, request)
		if err != nil && mayBeApplied(a.err) {
			err = &doubtfulError{err}
		}
		return reply, err
	default:
		return a.reply, a.err
	}
}

// mayGather reports whether nothing about a claim is lost in a batch, and nothing of it harms the others.
func (c *coalescer) mayGather(ctx context.Context, request *dedupv1.ClaimTransactionRequest) bool {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < c.timeout {
		return false // The service would not know its deadline.
	}
	if md, ok := metadata.FromOutgoingContext(ctx); ok && len(md) > 0 {
		return false
	}
	return request.GetWait() == nil && proto.Size(request) <= maxGatheredBytes
}

// add adds a claim, and reports false if claims are not gathered now.
func (c *coalescer) add(e *entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.gathered.admits(time.Since(c.begun)) {
		return false
	}
	call := c.gathered.add(e)
	if call == nil && !c.gathered.crowded() {
		if c.settling {
			return true
		}
		if c.gathered.together {
			// Let those callers that can run add their claims.
			c.settling = true
			c.mu.Unlock()
			runtime.Gosched()
			c.mu.Lock()
			c.settling = false
			c.prune()
		}
		call = c.gathered.settle()
	}
	c.start(call)
	return true
}

// start makes a call, if any, and limits the wait of the claims left; the lock is held.
func (c *coalescer) start(call *gatheredCall[*entry]) {
	if call != nil {
		for _, e := range call.claims {
			e.sent = true
		}
		if len(call.claims) == 1 {
			call.claims[0].answer <- answer{alone: call}
		} else {
			go c.send(call)
		}
	}
	if len(c.gathered.waiting) == 0 {
		if c.timer != nil {
			c.timer.Stop()
			c.timer = nil
		}
	} else if c.timer == nil {
		c.timer = time.AfterFunc(c.delay, c.expire)
	}
}

// prune drops the claims of callers that have left: nobody would hold them. The lock is held.
func (c *coalescer) prune() {
	c.gathered.waiting = slices.DeleteFunc(c.gathered.waiting, func(e *entry) bool { return e.ctx.Err() != nil })
}

func (c *coalescer) expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil { // Otherwise the claims have left at this moment.
		c.timer = nil
		c.prune()
		c.start(c.gathered.expired())
	}
}

func (c *coalescer) ended(call *gatheredCall[*entry], failed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.prune()
	c.start(c.gathered.ended(call, failed, time.Since(c.begun)))
}

// leave takes back a claim whose caller leaves, and reports whether it was not sent.
func (c *coalescer) leave(e *entry) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.sent {
		return false
	}
	c.gathered.waiting = slices.DeleteFunc(c.gathered.waiting, func(each *entry) bool { return each == e })
	return true
}

// send sends a batch and distributes the answers.
func (c *coalescer) send(call *gatheredCall[*entry]) {
	entries := call.claims
	ctx, cancel := c.untilAllLeft(entries)
	defer cancel()
	request := &dedupv1.BatchClaimTransactionsRequest{Requests: make([]*dedupv1.ClaimTransactionRequest, len(entries))}
	for i, e := range entries {
		request.Requests[i] = e.request
	}
	reply, err := c.stub.BatchClaimTransactions(ctx, request)
	if err == nil && len(reply.GetEntries()) != len(entries) {
		err = status.Error(codes.Internal, "the service answered a batch with a wrong number of entries")
	}
	again := err != nil && !isOutage(err)
	c.ended(call, again)
	for i, e := range entries {
		if err != nil {
			e.answer <- answer{err: err, again: again}
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

// isOutage reports whether single claims would fail as well, so that each repeats its own by the rules of retries.
func isOutage(err error) bool {
	e := newError(err)
	return e.Code == codes.Unavailable || e.Code == codes.Canceled || e.retryInfo
}

// mayBeApplied reports whether a failed batch may have made its claims.
func mayBeApplied(err error) bool { return newError(err).Applied != AppliedNo }

// doubtfulError is the error of a claim that an earlier call of the same attempt may have made.
type doubtfulError struct{ cause error }

func (e *doubtfulError) Error() string { return e.cause.Error() }

// untilAllLeft returns the context of a batch. It ends after the timeout, and once no caller waits for the batch.
func (c *coalescer) untilAllLeft(entries []*entry) (context.Context, context.CancelFunc) {
	end := time.Now().Add(c.timeout)
	for _, e := range entries {
		// The service must not work for a caller that has timed out.
		if deadline, ok := e.ctx.Deadline(); ok && deadline.Before(end) {
			end = deadline
		}
	}
	ctx, cancel := context.WithDeadline(context.Background(), end)
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
