package dedup

import (
	"crypto/rand"
	"encoding/base64"
)

// newToken returns a unique claim token: 16 random bytes in base64url without padding.
func newToken() string {
	var random [16]byte
	// Read never returns an error; it crashes the program instead.
	_, _ = rand.Read(random[:])
	return base64.RawURLEncoding.EncodeToString(random[:])
}
