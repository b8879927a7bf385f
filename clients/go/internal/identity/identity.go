// Package identity reads idempotency keys and computes fingerprints, as defined by docs/client-contract.md.
package identity

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
)

var errKey = errors.New("send one idempotency key with 1 or more visible ASCII characters")

// Key returns the key in the values of a header or of metadata: an RFC 8941 string, or bare.
func Key(values []string) (string, error) {
	if len(values) != 1 {
		return "", errKey
	}
	value := strings.Trim(values[0], " \t")
	if text, quoted := strings.CutPrefix(value, `"`); quoted {
		return quotedKey(text)
	}
	invalid := func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == ',' }
	if value == "" || strings.ContainsFunc(value, invalid) {
		return "", errKey
	}
	return value, nil
}

// quotedKey returns the key in the text after an opening quote.
func quotedKey(text string) (string, error) {
	var key strings.Builder
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case c == '"':
			if i != len(text)-1 || key.Len() == 0 {
				return "", errKey
			}
			return key.String(), nil
		case c == '\\' && i+1 < len(text) && (text[i+1] == '"' || text[i+1] == '\\'):
			i++
			c = text[i]
		case c == '\\' || c < ' ' || c > '~':
			return "", errKey
		}
		key.WriteByte(c)
	}
	return "", errKey
}

// Fingerprint returns the SHA-256 of the netstrings of the parts.
func Fingerprint(parts ...[]byte) []byte {
	digest := sha256.New()
	for _, part := range parts {
		_, _ = fmt.Fprintf(digest, "%d:", len(part))
		_, _ = digest.Write(part)
		_, _ = digest.Write([]byte{','})
	}
	return digest.Sum(nil)
}
