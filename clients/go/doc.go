// Package dedup admits each transaction at most once: it is the Go client of the dedup service.
//
// Claim a transaction before work that must not run twice. Exactly one caller gets a [Claim], the others a
// [*DuplicateError] with the holder's transaction.
//
//	claim, err := client.Claim(ctx, "order-1234")
//	switch {
//	case errors.Is(err, dedup.ErrDuplicate):
//		return conflict // HTTP 409
//	case err != nil:
//		return unavailable // HTTP 503: this may or may not be a duplicate
//	}
//	// The work, then:
//	err = claim.Complete(ctx, result)
//
// Each call uses one fresh claim token for all its attempts, so a retry after a lost reply is never mistaken for a
// duplicate. A reply without an outcome is an error. Only [Allow] grants claims without the service.
//
// The service logs a call under the x-correlation-id in its outgoing metadata. It returns the id in the trailing
// metadata only for logged calls, so a quick success usually has none.
package dedup
