package dedup

import (
	"cmp"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// State is the state of a claimed transaction.
type State int

const (
	// StateUnspecified is never reported by the service.
	StateUnspecified State = iota
	// StateInProgress means that the transaction is claimed and not completed.
	StateInProgress
	// StateCompleted means that the holder completed the work.
	StateCompleted
)

// String returns the state as text.
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

// Transaction is a claimed transaction. It never contains the claim token.
//
// Unknown times are zero, as for a claim another program wrote.
type Transaction struct {
	// ID is byte for byte as claimed.
	ID string
	// Namespace is the namespace of the id.
	Namespace string
	// State is in progress or completed.
	State State
	// Claimant is the holder's [Claimant].
	Claimant string
	// ClaimTime is by the clock of the service.
	ClaimTime time.Time
	// ExpireTime is when the transaction expires.
	ExpireTime time.Time
	// CompletionTime is zero while in progress.
	CompletionTime time.Time
	// Result is byte for byte the holder's.
	Result []byte
}

// String returns the hashed id and the state, because an id may identify a user.
func (t Transaction) String() string {
	return fmt.Sprintf("transaction %s in %s, %v", hashed(t.ID), cmp.Or(t.Namespace, "default"), t.State)
}

// GoString returns the same text as String.
func (t Transaction) GoString() string { return t.String() }

// LogValue returns the hashed id, the namespace and the state.
func (t Transaction) LogValue() slog.Value {
	return slog.GroupValue(slog.String("transaction", hashed(t.ID)), slog.String("namespace", cmp.Or(t.Namespace, "default")),
		slog.String("state", t.State.String()))
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

// timeOf returns the zero time for an unset timestamp; AsTime would return 1970.
func timeOf(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}
