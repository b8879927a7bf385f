package httpguard

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"

	dedup "github.com/dedup-service/dedup-service/clients/go"
)

// problem is a problem-details body (RFC 9457). Its type is the address of its heading in the client contract.
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
}

const contract = "https://github.com/dedup-service/dedup-service/blob/main/docs/client-contract.md#"

var (
	inProgress = problem{
		contract + "in-progress", "A request with this Idempotency-Key is in progress", http.StatusConflict,
		"The first request with this key has not ended, or its effect is unknown. Send the same request again later.",
	}
	responseNotStored = problem{
		contract + "response-not-stored", "The response is not stored", http.StatusGone,
		"The first request with this key has ended, and is not run again. Its response is not stored.",
	}
	keyReused = problem{
		contract + "key-reused", "The Idempotency-Key was used for another request", http.StatusUnprocessableEntity,
		"Send a new key with a new request.",
	}
	unavailable = problem{
		contract + "unavailable", "The check for duplicate requests is unavailable", http.StatusServiceUnavailable,
		"The request was not run. Send it again with the same key.",
	}
)

const (
	detailKey     = "Send one header Idempotency-Key with 1 or more visible ASCII characters, such as a UUID."
	detailPath    = "The path of the request is not UTF-8 after percent-decoding, or has an invalid percent escape."
	detailTooLong = "The Idempotency-Key is too long: with caller, method and path it may have 512 bytes."
)

var (
	errPath    = errors.New(detailPath)
	errTooLong = errors.New(detailTooLong)
)

// detailOf returns what is wrong with a request without a valid identity. The text of other errors is private.
func detailOf(err error) string {
	if err == errPath || err == errTooLong {
		return err.Error()
	}
	return detailKey
}

func keyInvalid(detail string) problem {
	return problem{
		contract + "key-invalid", "The Idempotency-Key is missing or invalid", http.StatusBadRequest, detail,
	}
}

func bodyTooLarge(limit int64) problem {
	return problem{
		contract + "body-too-large", "The request body is too large", http.StatusRequestEntityTooLarge,
		fmt.Sprintf("A request with an Idempotency-Key may have a body of up to %d bytes.", limit),
	}
}

// refuse answers a request that must not run. Only a duplicate is a conflict, never an error.
func (g *guard) refuse(w http.ResponseWriter, r *http.Request, err error) {
	var duplicate *dedup.DuplicateError
	switch {
	case errors.As(err, &duplicate):
		g.refuseDuplicate(w, duplicate.Transaction)
	case errors.Is(err, dedup.ErrPayloadMismatch):
		write(w, keyReused)
	case invalidID(err):
		write(w, keyInvalid(detailKey))
	default:
		g.logger.WarnContext(r.Context(), "dedup: the request was not checked and not run", slog.Any("error", err))
		write(w, unavailable)
	}
}

func (g *guard) refuseDuplicate(w http.ResponseWriter, t dedup.Transaction) {
	if t.State != dedup.StateCompleted {
		write(w, inProgress)
		return
	}
	first, ok := decode(t.Result)
	if g.replayedHeader != "" {
		w.Header().Set(g.replayedHeader, "true")
	}
	location := first.header.Get("Location")
	switch {
	case ok && first.replayable:
		for name, values := range first.header {
			w.Header()[name] = values
		}
		w.WriteHeader(first.status)
		_, _ = w.Write(first.body)
	case location != "":
		w.Header().Set("Location", location)
		w.WriteHeader(http.StatusSeeOther)
	default:
		write(w, responseNotStored)
	}
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

func write(w http.ResponseWriter, p problem) {
	var body bytes.Buffer
	if err := json.NewEncoder(&body).Encode(p); err != nil {
		panic(err) // Strings and numbers always encode.
	}
	w.Header().Set("Content-Type", "application/problem+json")
	if p.Status == http.StatusConflict || p.Status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	w.WriteHeader(p.Status)
	_, _ = w.Write(body.Bytes())
}
