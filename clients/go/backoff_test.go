package dedup

import (
	"testing"
	"time"
)

// Doubling a long base must not overflow to a negative limit, for which rand.N panics.
func TestBackoffStaysWithinItsMaximum(t *testing.T) {
	for _, base := range []time.Duration{time.Nanosecond, 50 * time.Millisecond, 20 * time.Second, time.Hour} {
		client, err := NewFromStub(nil, WithBackoff(base, time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		for attempts := 1; attempts <= 100; attempts++ {
			if pause := client.jitter(attempts); pause < 0 || pause >= time.Hour {
				t.Errorf("base %v: a pause of %v after %d attempts", base, pause, attempts)
			}
		}
	}
}
