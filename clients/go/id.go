package dedup

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// maxIDBytes is the contract's limit for a transaction id.
const maxIDBytes = 512

// TransactionID joins parts with ':' into a transaction id. Different parts never produce the same id.
//
// In each part, the bytes of '%', ':' and control characters become %XX. Other bytes are kept. TransactionID fails if
// the id is empty or longer than 512 bytes, or if a part is not valid UTF-8.
func TransactionID(parts ...string) (string, error) {
	var id strings.Builder
	for i, part := range parts {
		if !utf8.ValidString(part) {
			return "", fmt.Errorf("dedup: part %d of the transaction id is not valid UTF-8", i)
		}
		if i > 0 {
			id.WriteByte(':')
		}
		for _, r := range part {
			if r == '%' || r == ':' || isControl(r) {
				for _, b := range []byte(string(r)) {
					fmt.Fprintf(&id, "%%%02X", b)
				}
			} else {
				id.WriteRune(r)
			}
		}
	}
	switch n := id.Len(); {
	case n == 0:
		return "", errors.New("dedup: the transaction id is empty")
	case n > maxIDBytes:
		return "", fmt.Errorf("dedup: the transaction id has %d bytes; the limit is %d", n, maxIDBytes)
	}
	return id.String(), nil
}

// isControl reports whether the contract calls r a control character.
func isControl(r rune) bool {
	return r < 0x20 || r >= 0x7F && r <= 0x9F
}
