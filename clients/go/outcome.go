package dedup

// Outcome is what a guard does with a claim after the work, such as package httpguard by the status of the response.
type Outcome int

const (
	// Keep keeps the claim until it expires, because the effect of the work is unknown.
	Keep Outcome = iota
	// Complete completes the transaction with the response as its result.
	Complete
	// Release frees the transaction, because the work had no effect.
	Release
)
