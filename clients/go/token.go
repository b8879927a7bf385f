package dedup

import (
	"crypto/rand"
	"encoding/base64"
)

// newToken returns a unique claim token: base64url of 16 random bytes, without padding.
func newToken() string {
	var random [16]byte
	// Read crashes the program instead of returning an error.
	_, _ = rand.Read(random[:])
	return base64.RawURLEncoding.EncodeToString(random[:])
}
