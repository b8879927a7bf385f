package dedup

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// State says what has become of a claimed transaction.
type State int

const (
	// StateUnspecified is never reported by the service.
	StateUnspecified State = iota
	// StateInProgress means that the work is neither completed nor released.
	StateInProgress
	// StateCompleted means that the holder reported the work as done.
	StateCompleted
)

// String returns the state in words.
func (s State) String() string {
	switch s {
	case StateInProgress:
		return "in progress"
	case StateCompleted:
		return "completed"
	default:
		return "unspecified"
	}
}

// Transaction is a claimed transaction as anybody may see it: it never contains the claim token.
//
// Times are zero where the service does not know them, as for a claim that it did not write itself.
type Transaction struct {
	// ID is the id, byte for byte as it was claimed.
	ID string
	// Namespace is the namespace that it was claimed in.
	Namespace string
	// State says whether the work is in progress or completed.
	State State
	// Claimant is who claimed it, in the words of that caller.
	Claimant string
	// ClaimTime is when it was claimed, by the clock of the service.
	ClaimTime time.Time
	// ExpireTime is when it will be forgotten.
	ExpireTime time.Time
	// CompletionTime is when it was completed, and zero while it is in progress.
	CompletionTime time.Time
	// Result is what the holder gave on completion, byte for byte.
	Result []byte
}

func fromProto(t *dedupv1.Transaction) Transaction {
	return Transaction{
		ID:             t.GetTransactionId(),
		Namespace:      t.GetNamespace(),
		State:          State(t.GetState()),
		Claimant:       t.GetClaimant(),
		ClaimTime:      timeOf(t.GetClaimTime()),
		ExpireTime:     timeOf(t.GetExpireTime()),
		CompletionTime: timeOf(t.GetCompletionTime()),
		Result:         t.GetResult(),
	}
}

// timeOf maps an unset timestamp to the zero time, where AsTime would say 1970.
func timeOf(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}
