// Package dedup admits each transaction at most once: it is the Go client of the dedup service.
//
// Claim a transaction before doing what must not be done twice. Of any number of concurrent or later callers exactly
// one gets a [Claim]; the others get an error that matches [ErrDuplicate] and says who holds the transaction.
//
//	claim, err := client.Claim(ctx, "order-1234")
//	switch {
//	case errors.Is(err, dedup.ErrDuplicate):
//		return conflict // HTTP 409
//	case err != nil:
//		return unavailable // HTTP 503: nobody knows whether this is a duplicate
//	}
//	// The work, then:
//	err = claim.Complete(ctx, result)
//
// Every logical call makes one fresh claim token, and its retries repeat that token, so that a lost reply is never
// mistaken for a duplicate. Only a claim that the service granted is a go: an error is not, and neither is a reply that
// names no outcome. The one exception is what the caller asks for with [OnUnavailable].
package dedup
