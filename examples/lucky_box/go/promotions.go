package main

import (
	"errors"
	"sync"
	"time"
)

// errConflict: another payout of the box started meanwhile.
var errConflict = errors.New("conflict")

// work is the latency of the reward service.
const work = 20 * time.Millisecond

// promotions pays rewards. As in the original, a payout fails if a later one has started.
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
