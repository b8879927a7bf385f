package dedup

import "time"

// Crowd holds back the client's next claims, however long, until leave is called. waiting returns their number.
func Crowd(c *Client) (leave func(), waiting func() int) {
	gathered := &c.coalescer.gathered
	c.coalescer.mu.Lock()
	defer c.coalescer.mu.Unlock()
	c.coalescer.delay = time.Hour
	gathered.inFlight += crowd
	call := &gatheredCall[*entry]{claims: make([]*entry, crowd), round: gathered.round, failures: -1}
	leave = func() { c.coalescer.ended(call, false) }
	waiting = func() int {
		c.coalescer.mu.Lock()
		defer c.coalescer.mu.Unlock()
		return len(gathered.waiting)
	}
	return leave, waiting
}

// Coalesces reports whether the client coalesces.
func Coalesces(c *Client) bool { return c.coalescer != nil }

// InFlight returns the number of claims in flight that hold others back.
func InFlight(c *Client) int {
	c.coalescer.mu.Lock()
	defer c.coalescer.mu.Unlock()
	return c.coalescer.gathered.inFlight
}
