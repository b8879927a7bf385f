package dedup

import (
	"container/heap"
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

const (
	defaultMaxHold = time.Hour

	extensionShare  = 3  // the next extension is due after a third of the lease
	marginShare     = 10 // repeats, and the notice before the end of the lease, take a tenth of it
	longestJitter   = 0.1
	shortestRepeat  = 50 * time.Millisecond
	maxInFlightKept = 100 // extensions of a client
)

// KeepAliveOption configures [Claim.KeepAlive].
type KeepAliveOption func(*keepAliveSettings)

type keepAliveSettings struct{ maxHold time.Duration }

// MaxHold limits how long after the claim an extension may end. The default is 1 hour.
func MaxHold(d time.Duration) KeepAliveOption {
	return func(s *keepAliveSettings) { s.maxHold = d }
}

// KeepAlive extends the claim in the background until stop, Complete, Release or the client's Close is called.
//
// It returns a copy of ctx that also ends when the claim is lost; context.Cause then returns [ErrClaimLost]. The claim is
// lost if another caller may get it: the service reports that it is not held, or its end is near and it was not extended.
// Complete may still succeed. Call stop after the work: it ends the returned context.
//
// Claims with [ExpireTime], ShadowDuplicate or FailOpen are not extended and never lost.
func (c *Claim) KeepAlive(ctx context.Context, opts ...KeepAliveOption) (_ context.Context, stop context.CancelFunc) {
	settings := keepAliveSettings{maxHold: defaultMaxHold}
	for _, opt := range opts {
		opt(&settings)
	}
	kept, cancel := context.WithCancelCause(ctx)
	if c.lease == nil {
		return kept, func() { cancel(nil) }
	}
	keeper := c.client.keeper
	keeper.keep(ctx, c.lease, settings.maxHold, cancel)
	return kept, func() {
		keeper.end(c.lease)
		cancel(nil)
	}
}

// lease is what a client knows of the lifetime of its claim. The keeper's lock protects it.
type lease struct {
	request *dedupv1.ExtendTransactionRequest // without expiry
	length  time.Duration
	sent    time.Time // of the claim
	ends    time.Time
	unsure  bool // a replayed claim may end earlier, until it is extended

	holdEnds time.Time
	due      time.Time // of the next extension or of the loss
	lost     []context.CancelCauseFunc
	calls    context.Context // of the extensions
	endCalls context.CancelFunc
	index    int  // in the queue; -1 while not kept alive
	over     bool // completed, released or lost
	waiting  bool // an extension waits for its turn
}

// newLease returns the lease of a claim, or nil if the claim is not kept alive.
func newLease(c *Claim, request *dedupv1.ClaimTransactionRequest, sent time.Time) *lease {
	length := c.Transaction.ExpireTime.Sub(c.Transaction.ClaimTime)
	if ttl := request.GetTtl(); ttl != nil {
		length = ttl.AsDuration()
	}
	if _, fixed := request.GetExpiry().(*dedupv1.ClaimTransactionRequest_ExpireTime); fixed || c.ShadowDuplicate || length <= 0 {
		return nil
	}
	return &lease{
		request: &dedupv1.ExtendTransactionRequest{TransactionId: c.id, Namespace: c.namespace, ClaimToken: c.Token},
		length:  length, sent: sent, ends: sent.Add(length), unsure: c.Replayed, index: -1,
	}
}

func nextExtension(length time.Duration, random float64) time.Duration {
	return time.Duration(float64(length) / extensionShare * (1 - longestJitter*random))
}

func repeat(length time.Duration) time.Duration { return max(length/marginShare, shortestRepeat) }

func lostAfter(length time.Duration) time.Duration { return length - length/marginShare }

// lostAt returns when the work must hear that the lease was not extended.
func (l *lease) lostAt() time.Time { return l.ends.Add(lostAfter(l.length) - l.length) }

// extension returns the ttl of an extension sent now. It is 0 if maxHold forbids one that helps.
func (l *lease) extension(now time.Time) time.Duration {
	ttl := min(l.length, l.holdEnds.Sub(now)).Truncate(time.Millisecond)
	if !l.unsure && !now.Add(ttl).After(l.ends) {
		return 0
	}
	return ttl
}

// keeper keeps the claims of a client alive, with one goroutine while there are any.
type keeper struct {
	stub           dedupv1.DedupServiceClient
	attemptTimeout time.Duration
	random         func() float64
	turns          chan struct{} // one for each extension in flight
	changed        chan struct{} // the first due time changed

	mu      sync.Mutex
	queue   leases
	running bool
	closed  bool
}

func newKeeper(stub dedupv1.DedupServiceClient, attemptTimeout time.Duration) *keeper {
	return &keeper{
		stub: stub, attemptTimeout: attemptTimeout, random: rand.Float64,
		turns: make(chan struct{}, maxInFlightKept), changed: make(chan struct{}, 1),
	}
}

func (k *keeper) keep(ctx context.Context, l *lease, maxHold time.Duration, lost context.CancelCauseFunc) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if l.over {
		return
	}
	l.lost = append(l.lost, lost)
	l.holdEnds = l.sent.Add(maxHold)
	if k.closed {
		k.lose(l)
		return
	}
	if l.index >= 0 {
		return
	}
	l.due = l.sent.Add(nextExtension(l.length, k.random()))
	if l.unsure {
		l.due = time.Now()
	}
	// Extensions keep the context's metadata and trace.
	l.calls, l.endCalls = context.WithCancel(context.WithoutCancel(ctx))
	heap.Push(&k.queue, l)
	if !k.running {
		k.running = true
		go k.run()
	} else {
		k.notify()
	}
}

// end ends the keep-alive of a lease without telling its work.
func (k *keeper) end(l *lease) {
	k.mu.Lock()
	defer k.mu.Unlock()
	l.over = true
	if l.index >= 0 {
		heap.Remove(&k.queue, l.index)
		l.endCalls()
		k.notify()
	}
}

// extended records an extension that the caller of the claim asked for.
func (k *keeper) extended(l *lease, end time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !end.After(l.ends) {
		return
	}
	l.ends = end
	if l.index >= 0 {
		l.due = end.Add(nextExtension(l.length, k.random()) - l.length)
		heap.Fix(&k.queue, l.index)
		k.notify()
	}
}

// close ends all keep-alive. The work of the kept claims is told, because nothing extends or completes them any more.
func (k *keeper) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	for len(k.queue) > 0 {
		k.lose(k.queue[0])
	}
}

// lose tells the work that its claim is lost; the lock is held.
func (k *keeper) lose(l *lease) {
	l.over = true
	if l.index >= 0 {
		heap.Remove(&k.queue, l.index)
		l.endCalls()
		k.notify()
	}
	for _, lost := range l.lost {
		lost(ErrClaimLost)
	}
}

// notify makes run look at the queue again.
func (k *keeper) notify() {
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

// run serves the queue until it is empty.
func (k *keeper) run() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		pause, ok := k.serveDue()
		if !ok {
			return
		}
		timer.Reset(pause)
		select {
		case <-timer.C:
		case <-k.changed:
		}
	}
}

// serveDue returns the time until the next lease is due, or false if there is none.
func (k *keeper) serveDue() (time.Duration, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	for len(k.queue) > 0 && !k.queue[0].due.After(now) {
		k.serve(k.queue[0], now)
	}
	if len(k.queue) == 0 {
		k.running = false
		return 0, false
	}
	return k.queue[0].due.Sub(now), true
}

// serve extends a lease that is due, or tells its loss; the lock is held.
func (k *keeper) serve(l *lease, now time.Time) {
	lostAt := l.lostAt()
	if !now.Before(lostAt) {
		k.lose(l)
		return
	}
	l.due = lostAt
	if l.extension(now) > 0 {
		l.due = earlier(lostAt, now.Add(repeat(l.length)))
		if !l.waiting {
			l.waiting = true
			go k.extend(l)
		}
	}
	heap.Fix(&k.queue, l.index)
}

// extend sends one extension. If it fails, serve repeats it.
func (k *keeper) extend(l *lease) {
	select {
	case k.turns <- struct{}{}:
		defer func() { <-k.turns }()
	case <-l.calls.Done():
		return
	}
	k.mu.Lock()
	l.waiting = false
	sent := time.Now()
	ttl, until := l.extension(sent), earlier(l.lostAt(), sent.Add(k.attemptTimeout))
	k.mu.Unlock()
	if ttl <= 0 {
		return
	}
	ctx, cancel := context.WithDeadline(l.calls, until)
	defer cancel()
	reply, err := k.stub.ExtendTransaction(ctx, &dedupv1.ExtendTransactionRequest{
		TransactionId: l.request.GetTransactionId(), Namespace: l.request.GetNamespace(), ClaimToken: l.request.GetClaimToken(),
		Expiry: &dedupv1.ExtendTransactionRequest_Ttl{Ttl: durationOf(ttl)},
	})
	if err != nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if l.index < 0 { // Ended meanwhile.
		return
	}
	switch reply.GetOutcome() {
	case dedupv1.ExtendOutcome_EXTEND_OUTCOME_EXTENDED:
		if end := sent.Add(ttl); l.unsure || end.After(l.ends) {
			l.ends, l.unsure = end, false
			l.due = sent.Add(nextExtension(l.length, k.random()))
			heap.Fix(&k.queue, l.index)
			k.notify()
		}
	case dedupv1.ExtendOutcome_EXTEND_OUTCOME_NOT_HELD:
		k.lose(l)
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// leases is a heap by due time.
type leases []*lease

func (q leases) Len() int           { return len(q) }
func (q leases) Less(i, j int) bool { return q[i].due.Before(q[j].due) }

func (q leases) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

// Push implements [heap.Interface].
func (q *leases) Push(l any) {
	l.(*lease).index = len(*q)
	*q = append(*q, l.(*lease))
}

// Pop implements [heap.Interface].
func (q *leases) Pop() any {
	last := len(*q) - 1
	l := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	l.index = -1
	return l
}
