package dedup

import "time"

const (
	// crowd is the number of claims in flight from which further claims wait for each other.
	crowd = 4
	// maxGathered is the size of the largest batch: the service works on as many claims at a time.
	maxGathered = 100
	// maxGatherDelay limits the wait of a claim.
	maxGatherDelay = time.Millisecond
	// batchTimeoutShare is the part of the attempt timeout that a batch may take, as a divisor.
	batchTimeoutShare = 4
	firstGatherPause  = time.Second
	maxGatherPause    = time.Minute
	// maxGatheredBytes is more than any valid claim has.
	maxGatheredBytes = 1024
)

// gathering decides which claims travel together, by docs/client-contract.md#coalescing. It has neither a lock nor a
// clock: its times are durations since one moment.
type gathering[T any] struct {
	waiting  []T
	inFlight int // claims in calls of this round
	round    int // a new one begins when the calls in flight turn out to be slow
	// together reports whether the last call was a batch: claims answered together are mostly followed by others.
	together bool

	pause    time.Duration // after the last batch that failed; 0 after a good one
	resumeAt time.Duration // the end of the pause
	trying   bool          // the first batch after the pause is in flight
	failures int           // batches that failed, so that those in flight at the same time count once
}

// gatheredCall is a call to make: a batch, or one claim alone.
type gatheredCall[T any] struct {
	claims          []T
	round, failures int
}

// admits reports whether a claim may be gathered now. Otherwise it travels alone.
func (g *gathering[T]) admits(now time.Duration) bool {
	return g.pause == 0 || (now >= g.resumeAt && !g.trying)
}

// add adds a claim. It returns the batch that the claim fills, or nil.
func (g *gathering[T]) add(claim T) *gatheredCall[T] {
	g.waiting = append(g.waiting, claim)
	if len(g.waiting) < maxGathered {
		return nil
	}
	return g.leave()
}

// crowded reports whether claims wait for a call in flight.
func (g *gathering[T]) crowded() bool { return g.inFlight >= crowd }

// settle returns the call to make after the claims of one moment were added, or nil.
func (g *gathering[T]) settle() *gatheredCall[T] {
	if g.crowded() || len(g.waiting) == 0 {
		return nil
	}
	return g.leave()
}

// ended returns the call to make after another has ended, or nil. failed reports a batch that failed as a whole.
func (g *gathering[T]) ended(call *gatheredCall[T], failed bool, now time.Duration) *gatheredCall[T] {
	if len(call.claims) > 1 && call.failures == g.failures {
		g.trying = false
		if failed {
			g.failures++
			g.pause = min(max(2*g.pause, firstGatherPause), maxGatherPause)
			g.resumeAt = now + g.pause
		} else {
			g.pause = 0
		}
	}
	if call.round == g.round {
		g.inFlight -= len(call.claims)
	}
	return g.settle()
}

// expired returns the call to make after the longest wait, or nil. The calls in flight no longer hold claims back.
func (g *gathering[T]) expired() *gatheredCall[T] {
	g.inFlight = 0
	g.round++
	return g.settle()
}

func (g *gathering[T]) leave() *gatheredCall[T] {
	call := &gatheredCall[T]{claims: g.waiting, round: g.round, failures: g.failures}
	g.waiting = nil
	g.inFlight += len(call.claims)
	g.together = len(call.claims) > 1
	g.trying = g.trying || (g.pause > 0 && g.together)
	return call
}
