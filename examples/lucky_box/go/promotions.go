package main

import (
	"errors"
	"sync"
	"time"
)

// errConflict means that another payout of the same box came in between.
var errConflict = errors.New("conflict")

// work is what the reward service behind the API takes.
const work = 20 * time.Millisecond

// promotions pays rewards; as in the original a payout fails when a later one has begun.
type promotions struct {
	mutex sync.Mutex
	begun map[string]int
}

// pay returns the reward, or errConflict.
func (p *promotions) pay(transactionID string) (int, error) {
	p.mutex.Lock()
	p.begun[transactionID]++
	mine := p.begun[transactionID]
	p.mutex.Unlock()
	time.Sleep(work)
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.begun[transactionID] != mine {
		return 0, errConflict
	}
	return 5, nil
}
