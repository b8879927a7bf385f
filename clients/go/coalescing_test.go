package dedup_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
	"github.com/dedup-service/dedup-service/clients/go/internal/servertest"
)

// calls counts the claims of a client by the way they travel, and can fail or hold its batches.
type calls struct {
	mu      sync.Mutex
	alone   []string // ids
	batches [][]string
	tokens  map[string][]string // by id

	batch func(ctx context.Context) error // called before a batch; an error is its answer
	after func() error                    // called after a batch; an error replaces its answer
}

func (c *calls) intercept(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	switch r := req.(type) {
	case *dedupv1.ClaimTransactionRequest:
		c.note(&c.alone, r)
	case *dedupv1.BatchClaimTransactionsRequest:
		var ids []string
		for _, each := range r.GetRequests() {
			c.note(&ids, each)
		}
		c.mu.Lock()
		c.batches = append(c.batches, ids)
		c.mu.Unlock()
		if c.batch != nil {
			if err := c.batch(ctx); err != nil {
				return err
			}
		}
		err := invoke(ctx, method, req, reply, conn, opts...)
		if err == nil && c.after != nil {
			err = c.after()
		}
		return err
	}
	return invoke(ctx, method, req, reply, conn, opts...)
}

func (c *calls) note(ids *[]string, r *dedupv1.ClaimTransactionRequest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	*ids = append(*ids, r.GetTransactionId())
	if c.tokens == nil {
		c.tokens = map[string][]string{}
	}
	c.tokens[r.GetTransactionId()] = append(c.tokens[r.GetTransactionId()], r.GetClaimToken())
}

func (c *calls) options() []dedup.Option {
	return []dedup.Option{dedup.WithCoalescing(true), dedup.WithDialOptions(grpc.WithUnaryInterceptor(c.intercept))}
}

// sent returns what has been sent so far.
func (c *calls) sent() (alone []string, batches [][]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.alone), slices.Clone(c.batches)
}

// answers are the claims and errors of concurrent calls, by id.
type answers struct {
	all    sync.WaitGroup
	mu     sync.Mutex
	claims map[string]*dedup.Claim
	errs   map[string]error
}

// claim claims in the background.
func (a *answers) claim(ctx context.Context, guard dedup.Guard, id string, opts ...dedup.CallOption) {
	a.all.Add(1)
	go func() {
		defer a.all.Done()
		claim, err := guard.Claim(ctx, id, opts...)
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.errs == nil {
			a.claims, a.errs = map[string]*dedup.Claim{}, map[string]error{}
		}
		a.claims[id], a.errs[id] = claim, err
	}()
}

// together claims ids, all in one batch.
func together(t *testing.T, client *dedup.Client, ids ...string) *answers {
	t.Helper()
	var a answers
	leave, waiting := dedup.Crowd(client)
	for _, id := range ids {
		a.claim(ctx, client, id)
	}
	servertest.Eventually(t, "the claims wait", func() bool { return waiting() == len(ids) })
	leave()
	return &a
}

func newIDs(n int) []string {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = newID()
	}
	return ids
}

func sorted(ids []string) []string { return slices.Sorted(slices.Values(ids)) }

func TestClaimsThatFindACrowdTravelTogether(t *testing.T) {
	onEachStore(t, func(t *testing.T, server *servertest.Server) {
		var c calls
		client := newClient(t, server.Target, c.options()...)
		held, ids := newID(), newIDs(3)
		mustClaim(t, client, held)
		answers := together(t, client, append(ids, held)...)
		answers.all.Wait()
		for _, id := range ids {
			if answers.errs[id] != nil {
				t.Errorf("%s: %v", id, answers.errs[id])
			}
		}
		if !errors.Is(answers.errs[held], dedup.ErrDuplicate) {
			t.Errorf("held: %v", answers.errs[held])
		}
		alone, batches := c.sent()
		if len(alone) != 1 || len(batches) != 1 || !slices.Equal(sorted(batches[0]), sorted(append(ids, held))) {
			t.Errorf("alone: %v, batches: %v", alone, batches)
		}
		tokens := map[string]bool{}
		for _, id := range ids {
			tokens[answers.claims[id].Token] = true
			if err := answers.claims[id].Complete(ctx, nil); err != nil {
				t.Errorf("the claim is not held by its token: %v", err)
			}
		}
		if len(tokens) != len(ids) {
			t.Error("claims share a token")
		}
	})
}

func TestOneOfManyCallersOfAnIDGetsTheClaim(t *testing.T) {
	onEachStore(t, func(t *testing.T, server *servertest.Server) {
		client := newClient(t, server.Target)
		var claimed, duplicates atomic.Int32
		id := newID()
		var all sync.WaitGroup
		for range 64 {
			all.Add(1)
			go func() {
				defer all.Done()
				switch _, err := client.Claim(ctx, id); {
				case err == nil:
					claimed.Add(1)
				case errors.Is(err, dedup.ErrDuplicate):
					duplicates.Add(1)
				default:
					t.Error(err)
				}
			}()
		}
		all.Wait()
		if claimed.Load() != 1 || duplicates.Load() != 63 {
			t.Errorf("claimed %d times, %d duplicates", claimed.Load(), duplicates.Load())
		}
	})
}

func TestManyCallersOfTheirOwnIDsGetThem(t *testing.T) {
	var c calls
	client := newClient(t, embeddedServer(t).Target, c.options()...)
	var a answers
	for _, id := range newIDs(250) {
		a.claim(ctx, client, id)
	}
	a.all.Wait()
	for id, err := range a.errs {
		if err != nil || a.claims[id].Transaction.ID != id {
			t.Errorf("%s: %+v, %v", id, a.claims[id], err)
		}
	}
	_, batches := c.sent()
	for _, batch := range batches {
		if len(batch) > 100 {
			t.Errorf("a batch of %d", len(batch))
		}
	}
}

func TestClaimAloneKeepsItsContext(t *testing.T) {
	type key struct{}
	ctx := context.WithValue(ctx, key{}, "caller")
	var found any
	intercept := func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		found = ctx.Value(key{})
		return invoke(ctx, method, req, reply, conn, opts...)
	}
	client := newClient(t, embeddedServer(t).Target, dedup.WithCoalescing(true), dedup.WithDialOptions(grpc.WithUnaryInterceptor(intercept)))
	mustClaimWith(ctx, t, client, newID())
	if found != "caller" {
		t.Errorf("the interceptor found %v", found)
	}
	if n := dedup.InFlight(client); n != 0 {
		t.Errorf("%d claims still count", n)
	}
}

func TestSomeClaimsAreNotGathered(t *testing.T) {
	var c calls
	// Without retries, which travel alone as well.
	client := newClient(t, embeddedServer(t).Target, append(c.options(), dedup.WithBackoff(time.Hour, time.Hour))...)
	leave, _ := dedup.Crowd(client)
	defer leave()
	hasty, cancel := context.WithTimeout(ctx, 2*time.Second) // A batch may take 2.5 s here.
	defer cancel()
	named := metadata.AppendToOutgoingContext(ctx, "x-correlation-id", "click-4711")
	mustClaimWith(hasty, t, client, newID())
	mustClaimWith(named, t, client, newID())
	mustClaim(t, client, newID(), dedup.Wait(time.Millisecond))
	large := string(make([]byte, 2000))
	if _, err := client.Claim(ctx, large); status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
	if alone, batches := c.sent(); len(alone) != 4 || len(batches) != 0 {
		t.Errorf("alone: %v, batches: %v", alone, batches)
	}
}

func TestCoalescingIsOffWhereAConnectionMayReadContexts(t *testing.T) {
	for name, opts := range map[string][]dedup.Option{
		"dial options": {dedup.WithDialOptions(grpc.WithUserAgent("test"))},
		"switched off": {dedup.WithCoalescing(false)},
	} {
		if client := newClient(t, "127.0.0.1:1", opts...); dedup.Coalesces(client) {
			t.Errorf("%s: coalesces", name)
		}
	}
	if !dedup.Coalesces(newClient(t, "127.0.0.1:1")) {
		t.Error("does not coalesce by default")
	}
	client, err := dedup.NewFromStub(nil)
	if err != nil || dedup.Coalesces(client) {
		t.Errorf("with a stub: %v", err)
	}
}

func TestLostReplyOfABatchIsRetriedClaimByClaim(t *testing.T) {
	onEachStore(t, func(t *testing.T, server *servertest.Server) {
		proxy := servertest.StartProxy(t, server.Target)
		var c calls
		client := newClient(t, proxy.Target, append(c.options(), dedup.WithBudget(time.Minute), dedup.WithAttemptTimeout(time.Minute))...)
		direct := newClient(t, server.Target)
		mustClaim(t, client, newID()) // Connect.
		taken, ids := newID(), newIDs(3)
		mustClaim(t, direct, taken)
		proxy.SwallowReplies(true)
		answers := together(t, client, append(ids, taken)...)
		for _, id := range ids {
			held(t, direct, id)
		}
		leave, _ := dedup.Crowd(client) // A gathered retry would wait.
		defer leave()
		proxy.SwallowReplies(false)
		proxy.Cut()
		answers.all.Wait()
		for _, id := range ids {
			if claim, err := answers.claims[id], answers.errs[id]; err != nil || !claim.Replayed {
				t.Fatalf("the retry: %+v, %v", claim, err)
			}
			if tokens := c.tokens[id]; len(tokens) < 2 || len(slices.Compact(slices.Clone(tokens))) != 1 {
				t.Errorf("tokens: %v", tokens)
			}
			if _, err := direct.Claim(ctx, id); !errors.Is(err, dedup.ErrDuplicate) {
				t.Errorf("another caller: %v", err)
			}
		}
		if !errors.Is(answers.errs[taken], dedup.ErrDuplicate) {
			t.Errorf("taken: %v", answers.errs[taken])
		}
		if _, batches := c.sent(); len(batches) != 1 {
			t.Errorf("a retry was gathered: %v", batches)
		}
	})
}

func TestLostReplyWithoutARetryLeavesDoubt(t *testing.T) {
	server := embeddedServer(t)
	var c calls
	c.after = func() error { return status.Error(codes.Unavailable, "lost") }
	client := newClient(t, server.Target, append(c.options(), dedup.WithBackoff(time.Hour, time.Hour))...)
	answers := together(t, client, newIDs(2)...)
	answers.all.Wait()
	for id, err := range answers.errs {
		var failure *dedup.Error
		if !errors.As(err, &failure) || failure.Applied != dedup.AppliedUnknown {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// One slow entry does not hold the others: once the batch has taken too long, each claim travels alone.
func TestSlowEntryDoesNotHoldTheOthers(t *testing.T) {
	slow, good := newID(), newID()
	b := &stub{batch: func(ctx context.Context, r *dedupv1.BatchClaimTransactionsRequest) (*dedupv1.BatchClaimTransactionsResponse, error) {
		if deadline, _ := ctx.Deadline(); time.Until(deadline) > 500*time.Millisecond {
			t.Errorf("the batch may take %v, more than a quarter of the attempt", time.Until(deadline))
		}
		<-ctx.Done() // The service waits for its slowest entry.
		return nil, status.FromContextError(ctx.Err()).Err()
	}, alone: func(ctx context.Context, r *dedupv1.ClaimTransactionRequest) (*dedupv1.ClaimTransactionResponse, error) {
		if r.GetTransactionId() == slow {
			<-ctx.Done()
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		return granted()
	}}
	client, err := dedup.NewFromStub(b, dedup.WithCoalescing(true), dedup.WithAttemptTimeout(2*time.Second), dedup.WithBudget(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	leave, waiting := dedup.Crowd(client)
	waits, stop := context.WithCancel(ctx)
	defer stop()
	var a, b2 answers
	a.claim(ctx, client, good)
	b2.claim(waits, client, slow)
	servertest.Eventually(t, "the claims wait", func() bool { return waiting() == 2 })
	leave()
	a.all.Wait() // Before the slow one.
	if a.errs[good] != nil {
		t.Error(a.errs[good])
	}
	stop()
	b2.all.Wait()
}

func TestRefusedEntryFailsAlone(t *testing.T) {
	var c calls
	client := newClient(t, embeddedServer(t).Target, c.options()...)
	good, bad := newID(), ""
	answers := together(t, client, good, bad)
	answers.all.Wait()
	if answers.errs[good] != nil || status.Code(answers.errs[bad]) != codes.InvalidArgument {
		t.Errorf("good: %v, bad: %v", answers.errs[good], answers.errs[bad])
	}
	if _, batches := c.sent(); len(batches) != 1 {
		t.Errorf("batches: %v", batches)
	}
}

func TestRefusedBatchIsSentClaimByClaim(t *testing.T) {
	for _, code := range []codes.Code{codes.Unimplemented, codes.PermissionDenied, codes.ResourceExhausted, codes.InvalidArgument, codes.Internal} {
		t.Run(code.String(), func(t *testing.T) {
			var c calls
			c.batch = func(context.Context) error { return status.Error(code, "no batches here") }
			client := newClient(t, embeddedServer(t).Target, c.options()...)
			ids := newIDs(2)
			answers := together(t, client, ids...)
			answers.all.Wait()
			leave, _ := dedup.Crowd(client)
			defer leave()
			third := newID()
			mustClaim(t, client, third) // Not gathered during the pause.
			for id, err := range answers.errs {
				if err != nil {
					t.Errorf("%s: %v", id, err)
				}
			}
			if alone, batches := c.sent(); !slices.Equal(sorted(alone), sorted(append(ids, third))) || len(batches) != 1 {
				t.Errorf("alone: %v, batches: %v", alone, batches)
			}
		})
	}
}

// The batch may have made its claims, so a later refusal does not prove that nothing was done.
func TestDoubtAboutABatchStays(t *testing.T) {
	refusal := serviceError(codes.FailedPrecondition, "VALUE_DAMAGED", "no")
	for want, failure := range map[dedup.Applied]error{
		dedup.AppliedUnknown: status.Error(codes.Internal, "lost"),
		dedup.AppliedNo:      serviceError(codes.PermissionDenied, "CALLER_NOT_ALLOWED", "no"),
	} {
		client, err := dedup.NewFromStub(&stub{
			batch: func(context.Context, *dedupv1.BatchClaimTransactionsRequest) (*dedupv1.BatchClaimTransactionsResponse, error) {
				return nil, failure
			},
			alone: func(context.Context, *dedupv1.ClaimTransactionRequest) (*dedupv1.ClaimTransactionResponse, error) {
				return nil, refusal
			},
		}, dedup.WithCoalescing(true), dedup.WithAttemptTimeout(20*time.Second), dedup.WithBudget(time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		answers := together(t, client, "a", "b")
		answers.all.Wait()
		for id, err := range answers.errs {
			var e *dedup.Error
			if !errors.As(err, &e) || e.Applied != want || e.Code != codes.FailedPrecondition {
				t.Errorf("%s after %v: %v", id, failure, err)
			}
		}
	}
}

func TestOverloadIsRetriedAndNotSentAtOnce(t *testing.T) {
	var c calls
	c.batch = func(context.Context) error {
		return serviceError(codes.ResourceExhausted, "TOO_MANY_CALLS", "no", time.Millisecond)
	}
	client := newClient(t, embeddedServer(t).Target, c.options()...)
	answers := together(t, client, newIDs(2)...)
	answers.all.Wait()
	for id, err := range answers.errs {
		if err != nil {
			t.Errorf("%s: %v", id, err)
		}
	}
	c.batch = nil
	again := together(t, client, newIDs(2)...)
	again.all.Wait()
	if alone, batches := c.sent(); len(alone) != 2 || len(batches) != 2 {
		t.Errorf("alone: %v, batches: %v", alone, batches)
	}
}

func TestWrongNumberOfAnswersIsNotMatched(t *testing.T) {
	b := &stub{alone: func(context.Context, *dedupv1.ClaimTransactionRequest) (*dedupv1.ClaimTransactionResponse, error) {
		return &dedupv1.ClaimTransactionResponse{Outcome: dedupv1.ClaimOutcome_CLAIM_OUTCOME_DUPLICATE}, nil
	}}
	b.batch = func(context.Context, *dedupv1.BatchClaimTransactionsRequest) (*dedupv1.BatchClaimTransactionsResponse, error) {
		claim, _ := granted()
		entry := &dedupv1.BatchClaimEntry{Result: &dedupv1.BatchClaimEntry_Response{Response: claim}}
		return &dedupv1.BatchClaimTransactionsResponse{Entries: []*dedupv1.BatchClaimEntry{entry}}, nil
	}
	client, err := dedup.NewFromStub(b, dedup.WithCoalescing(true), dedup.WithAttemptTimeout(20*time.Second), dedup.WithBudget(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	answers := together(t, client, "a", "b")
	answers.all.Wait()
	for id, err := range answers.errs {
		if !errors.Is(err, dedup.ErrDuplicate) {
			t.Errorf("%s: %v", id, err)
		}
	}
}

func TestEmptyEntryIsNotAClaim(t *testing.T) {
	b := &stub{batch: func(_ context.Context, r *dedupv1.BatchClaimTransactionsRequest) (*dedupv1.BatchClaimTransactionsResponse, error) {
		return &dedupv1.BatchClaimTransactionsResponse{Entries: make([]*dedupv1.BatchClaimEntry, len(r.GetRequests()))}, nil
	}}
	client, err := dedup.NewFromStub(b, dedup.WithCoalescing(true), dedup.WithAttemptTimeout(20*time.Second), dedup.WithBudget(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	answers := together(t, client, "a", "b")
	answers.all.Wait()
	for id, err := range answers.errs {
		if !errors.Is(err, dedup.ErrUnavailable) {
			t.Errorf("%s: %v", id, err)
		}
	}
}

func TestCancelledClaimDoesNotCancelTheOthersOfItsBatch(t *testing.T) {
	sent, proceed := make(chan struct{}), make(chan struct{})
	var c calls
	c.batch = func(ctx context.Context) error {
		close(sent)
		select {
		case <-proceed:
			return nil
		case <-ctx.Done():
			t.Error("the batch was cancelled")
			return status.FromContextError(ctx.Err()).Err()
		}
	}
	client := newClient(t, embeddedServer(t).Target, append(c.options(), dedup.WithBudget(time.Minute), dedup.WithAttemptTimeout(time.Minute))...)
	leave, waiting := dedup.Crowd(client)
	var stays, leaves answers
	leaving, cancel := context.WithCancel(ctx)
	left, stayed := newID(), newID()
	leaves.claim(leaving, client, left)
	servertest.Eventually(t, "the first claim waits", func() bool { return waiting() == 1 })
	stays.claim(ctx, client, stayed)
	servertest.Eventually(t, "the claims wait", func() bool { return waiting() == 2 })
	leave()
	<-sent
	cancel()
	leaves.all.Wait()
	if err := leaves.errs[left]; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled claim: %v", err)
	}
	close(proceed)
	stays.all.Wait()
	if err := stays.errs[stayed]; err != nil {
		t.Errorf("other claim: %v", err)
	}
	servertest.Eventually(t, "the cancelled claim is released", func() bool {
		_, err := client.Get(ctx, left)
		return errors.Is(err, dedup.ErrNotFound)
	})
}

func TestBatchIsCancelledOnceAllItsClaimsAre(t *testing.T) {
	sent, ended := make(chan struct{}), make(chan struct{})
	var c calls
	c.batch = func(ctx context.Context) error {
		close(sent)
		<-ctx.Done()
		close(ended)
		return status.FromContextError(ctx.Err()).Err()
	}
	client := newClient(t, embeddedServer(t).Target, append(c.options(), dedup.WithAttemptTimeout(time.Hour), dedup.WithBudget(2*time.Hour))...)
	leave, waiting := dedup.Crowd(client)
	leaving, cancel := context.WithCancel(ctx)
	var a answers
	for _, id := range newIDs(2) {
		a.claim(leaving, client, id)
	}
	servertest.Eventually(t, "the claims wait", func() bool { return waiting() == 2 })
	leave()
	<-sent
	cancel()
	<-ended
	a.all.Wait()
}

func TestClaimCancelledBeforeItsBatchIsNotSent(t *testing.T) {
	var c calls
	client := newClient(t, embeddedServer(t).Target, c.options()...)
	leave, waiting := dedup.Crowd(client)
	leaving, cancel := context.WithCancel(ctx)
	gone, ids := newID(), newIDs(2)
	var leaves, stays answers
	leaves.claim(leaving, client, gone)
	for _, id := range ids {
		stays.claim(ctx, client, id)
	}
	servertest.Eventually(t, "the claims wait", func() bool { return waiting() == 3 })
	cancel()
	leaves.all.Wait()
	var failure *dedup.Error
	if err := leaves.errs[gone]; !errors.As(err, &failure) || failure.Applied != dedup.AppliedNo || !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	leave()
	stays.all.Wait()
	if alone, batches := c.sent(); len(alone) != 0 || len(batches) != 1 || !slices.Equal(sorted(batches[0]), sorted(ids)) {
		t.Errorf("alone: %v, batches: %v", alone, batches)
	}
}

func TestCloseEndsClaimsInABatch(t *testing.T) {
	server := embeddedServer(t)
	proxy := servertest.StartProxy(t, server.Target)
	var c calls
	client := newClient(t, proxy.Target, append(c.options(), dedup.WithAttemptTimeout(time.Hour), dedup.WithBudget(2*time.Hour))...)
	mustClaim(t, client, newID()) // Connect.
	proxy.SwallowReplies(true)
	ids := newIDs(3)
	answers := together(t, client, ids...)
	for _, id := range ids {
		held(t, newClient(t, server.Target), id)
	}
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	answers.all.Wait()
	for id, err := range answers.errs {
		if !errors.Is(err, dedup.ErrClosed) {
			t.Errorf("%s: %v", id, err)
		}
	}
}

func TestInvalidUTF8FailsOnlyItsOwnClaim(t *testing.T) {
	client := newClient(t, embeddedServer(t).Target)
	var a answers
	good, bad := newIDs(20), "\xff"
	a.claim(ctx, client, bad)
	for _, id := range good {
		a.claim(ctx, client, id)
	}
	a.all.Wait()
	for _, id := range good {
		if a.errs[id] != nil {
			t.Errorf("good: %v", a.errs[id])
		}
	}
	if status.Code(a.errs[bad]) != codes.InvalidArgument {
		t.Errorf("bad: %v", a.errs[bad])
	}
}

// stub is a service of a test's functions.
type stub struct {
	dedupv1.DedupServiceClient
	alone func(context.Context, *dedupv1.ClaimTransactionRequest) (*dedupv1.ClaimTransactionResponse, error)
	batch func(context.Context, *dedupv1.BatchClaimTransactionsRequest) (*dedupv1.BatchClaimTransactionsResponse, error)
}

func (s *stub) ClaimTransaction(ctx context.Context, r *dedupv1.ClaimTransactionRequest, _ ...grpc.CallOption) (*dedupv1.ClaimTransactionResponse, error) {
	return s.alone(ctx, r)
}

func (s *stub) BatchClaimTransactions(ctx context.Context, r *dedupv1.BatchClaimTransactionsRequest, _ ...grpc.CallOption) (*dedupv1.BatchClaimTransactionsResponse, error) {
	return s.batch(ctx, r)
}

// ReleaseTransaction reports that nothing is held.
func (*stub) ReleaseTransaction(context.Context, *dedupv1.ReleaseTransactionRequest, ...grpc.CallOption) (*dedupv1.ReleaseTransactionResponse, error) {
	return &dedupv1.ReleaseTransactionResponse{Outcome: dedupv1.ReleaseOutcome_RELEASE_OUTCOME_NOT_HELD}, nil
}
