package dedup

import (
	"crypto/rand"
	"encoding/base64"
)

// newToken makes a claim token that nobody else has: 16 random bytes in base64url without padding.
func newToken() string {
	var random [16]byte
	// Never fails: the program ends when the system has no randomness.
	_, _ = rand.Read(random[:])
	return base64.RawURLEncoding.EncodeToString(random[:])
}
