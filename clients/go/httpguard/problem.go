package httpguard

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	dedup "github.com/dedup-service/dedup-service/clients/go"
)

// problem is a problem-details body (RFC 9457).
type problem struct {
	Status      int          `json:"status"`
	Title       string       `json:"title"`
	Detail      string       `json:"detail,omitempty"`
	Transaction *transaction `json:"transaction,omitempty"`
}

// transaction is the holder as shown to duplicates, without the token.
type transaction struct {
	ID             string     `json:"id"`
	Namespace      string     `json:"namespace"`
	State          string     `json:"state"`
	Claimant       string     `json:"claimant,omitempty"`
	ClaimTime      *time.Time `json:"claim_time,omitempty"`
	ExpireTime     *time.Time `json:"expire_time,omitempty"`
	CompletionTime *time.Time `json:"completion_time,omitempty"`
}

func shown(t dedup.Transaction) *transaction {
	return &transaction{
		ID: t.ID, Namespace: t.Namespace, State: t.State.String(), Claimant: t.Claimant,
		ClaimTime: known(t.ClaimTime), ExpireTime: known(t.ExpireTime), CompletionTime: known(t.CompletionTime),
	}
}

func known(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// refuse answers a request that must not run: 409 for a duplicate, 422 for a mismatch, never 409 for an error.
func refuse(w http.ResponseWriter, err error) {
	var (
		duplicate *dedup.DuplicateError
		mismatch  *dedup.PayloadMismatchError
	)
	switch {
	case errors.As(err, &duplicate):
		refuseDuplicate(w, duplicate.Transaction)
	case errors.As(err, &mismatch):
		writeProblem(w, problem{
			Status: http.StatusUnprocessableEntity, Title: "The idempotency key was used for a different request",
			Detail: "Send a new key with a new body.",
		})
	case invalidID(err):
		writeProblem(w, problem{Status: http.StatusBadRequest, Title: "The idempotency key is invalid"})
	case errors.Is(err, dedup.ErrUnavailable), errors.Is(err, context.Canceled):
		w.Header().Set("Retry-After", "1")
		writeProblem(w, problem{
			Status: http.StatusServiceUnavailable, Title: "The dedup service is unavailable",
			Detail: "The request was not run. Send it again with the same key.",
		})
	default:
		writeProblem(w, problem{Status: http.StatusInternalServerError, Title: "The idempotency key could not be checked", Detail: "The request was not run."})
	}
}

func refuseDuplicate(w http.ResponseWriter, t dedup.Transaction) {
	if t.State != dedup.StateCompleted {
		writeProblem(w, problem{
			Status: http.StatusConflict, Title: "A request with this idempotency key is in progress",
			Detail: "Send it again later to get its response.", Transaction: shown(t),
		})
		return
	}
	if first, ok := decode(t.Result); ok {
		first.replay(w)
		return
	}
	writeProblem(w, problem{
		Status: http.StatusConflict, Title: "A request with this idempotency key is completed",
		Detail: "Its response was not stored: it was too large, or other code completed the transaction.", Transaction: shown(t),
	})
}

// invalidID reports whether the service rejected the key, which the sender can correct.
func invalidID(err error) bool {
	var e *dedup.Error
	if !errors.As(err, &e) {
		return false
	}
	for _, v := range e.Violations {
		if v.Field == "transaction_id" {
			return true
		}
	}
	return false
}

func writeProblem(w http.ResponseWriter, p problem) {
	body, err := json.Marshal(p)
	if err != nil {
		panic(err) // Strings, numbers and times before the year 10000 always encode.
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(p.Status)
	_, _ = w.Write(append(body, '\n'))
}
