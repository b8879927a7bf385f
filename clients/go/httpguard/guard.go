// Package httpguard makes handlers of net/http do the work of each idempotency key at most once.
//
//	guarded := httpguard.New(client)(handler)
//
// A request with the header Idempotency-Key claims a transaction before the handler runs:
//
//   - The first runs the handler, and its response is kept.
//   - While it runs, others are answered 409 with a problem-details body that says who holds the transaction.
//   - Afterwards others get the first response again, with the header Idempotency-Replayed: true.
//   - The same key with another body is answered 422, and 503 when the dedup service is unavailable.
//
// Requests without the header go to the handler unguarded, unless [RequireKey] is set. The key is the caller's word, so
// where callers must not see each other's responses a [WithKey] function has to put the caller into the transaction id.
package httpguard

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"log/slog"
	"net/http"

	dedup "github.com/dedup-service/dedup-service/clients/go"
)

const (
	// KeyHeader is where a caller puts the key of a request.
	KeyHeader = "Idempotency-Key"
	// ReplayedHeader is "true" on a response that is not the first of its kind.
	ReplayedHeader = "Idempotency-Replayed"

	defaultMaxResultBytes = 4096
	defaultMaxBodyBytes   = 1 << 20
)

// Option sets how requests are guarded.
type Option func(*guard)

// KeyFunc returns the transaction id of a request, best made by dedup.TransactionID. An empty id means that the request
// has no key; an error is answered 400.
type KeyFunc func(*http.Request) (id string, err error)

// WithKey sets what names the transaction of a request. The default is made of the method, the path and the header
// Idempotency-Key.
func WithKey(key KeyFunc) Option { return func(g *guard) { g.key = key } }

// RequireKey answers requests without a key 400, instead of passing them on unguarded.
func RequireKey() Option { return func(g *guard) { g.requireKey = true } }

// WithMaxResultBytes sets how large a response may be, head included, to be kept and replayed; the default is 4,096,
// as in the service. The key of a larger response is completed without it, and later requests are answered 409.
func WithMaxResultBytes(n int) Option { return func(g *guard) { g.maxResultBytes = n } }

// WithMaxBodyBytes sets how large the body of a guarded request may be, which is read for its fingerprint before the
// handler runs; the default is 1 MiB. A larger one is answered 413.
func WithMaxBodyBytes(n int64) Option { return func(g *guard) { g.maxBodyBytes = n } }

// ReleaseOnFailure gives the claim back when the handler panics or answers 5xx, so that a retry runs at once. Use it only
// where such an end means that nothing was done: otherwise the claim is left to expire, and retries are answered 409
// until then.
func ReleaseOnFailure() Option { return func(g *guard) { g.releaseOnFailure = true } }

// WithCallOptions sets options of each claim, such as dedup.TTL, dedup.Wait and dedup.OnUnavailable.
func WithCallOptions(opts ...dedup.CallOption) Option {
	return func(g *guard) { g.callOptions = append(g.callOptions, opts...) }
}

// WithLogger sets where a response that could not be recorded is logged; the default is slog.Default().
func WithLogger(l *slog.Logger) Option { return func(g *guard) { g.logger = l } }

type guard struct {
	dedup            dedup.Guard
	next             http.Handler
	key              KeyFunc
	requireKey       bool
	releaseOnFailure bool
	maxResultBytes   int
	maxBodyBytes     int64
	callOptions      []dedup.CallOption
	logger           *slog.Logger
}

// New returns middleware that guards a handler.
//
// The response is held back until it is recorded, or has outgrown what is kept; so a caller that has it can rely on the
// replay, and the handler cannot flush or hijack.
func New(client dedup.Guard, opts ...Option) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		g := &guard{
			dedup: client, next: next, key: keyOfHeader,
			maxResultBytes: defaultMaxResultBytes, maxBodyBytes: defaultMaxBodyBytes, logger: slog.Default(),
		}
		for _, opt := range opts {
			opt(g)
		}
		return g
	}
}

func keyOfHeader(r *http.Request) (string, error) {
	key := r.Header.Get(KeyHeader)
	if key == "" {
		return "", nil
	}
	return dedup.TransactionID("http", r.Method, r.URL.Path, key)
}

// ServeHTTP guards one request.
func (g *guard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id, err := g.key(r)
	switch {
	case err != nil:
		writeProblem(w, problem{Status: http.StatusBadRequest, Title: "The idempotency key is not usable", Detail: err.Error()})
		return
	case id == "" && g.requireKey:
		writeProblem(w, problem{
			Status: http.StatusBadRequest, Title: "The idempotency key is missing",
			Detail: "This request needs the header " + KeyHeader + ".",
		})
		return
	case id == "":
		g.next.ServeHTTP(w, r)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, g.maxBodyBytes))
	if err != nil {
		status, title := http.StatusBadRequest, "The body could not be read"
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			status, title = http.StatusRequestEntityTooLarge, "The body is too large"
		}
		writeProblem(w, problem{Status: status, Title: title})
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	fingerprint := sha256.Sum256(body)
	claim, err := g.dedup.Claim(r.Context(), id, append([]dedup.CallOption{dedup.Fingerprint(fingerprint[:])}, g.callOptions...)...)
	if err != nil {
		refuse(w, err)
		return
	}
	g.run(w, r, claim)
}

// run lets the handler work, and records how it ended.
func (g *guard) run(w http.ResponseWriter, r *http.Request, claim *dedup.Claim) {
	// Whether the work was done does not depend on whether the caller still listens.
	ctx := context.WithoutCancel(r.Context())
	recorder := &recorder{to: w, limit: g.maxResultBytes}
	ended := false
	defer func() {
		if !ended { // By a panic, which goes on.
			g.failed(ctx, claim)
		}
	}()
	g.next.ServeHTTP(recorder, r)
	ended = true
	if recorder.status >= http.StatusInternalServerError {
		g.failed(ctx, claim)
	} else if err := claim.Complete(ctx, recorder.result()); err != nil {
		// The work is done and its caller is told so. Until the claim expires later requests are answered 409.
		g.logger.WarnContext(ctx, "dedup: the response was not recorded", slog.Any("error", err))
	}
	recorder.flush()
}

// failed gives the claim back where that was asked for.
func (g *guard) failed(ctx context.Context, claim *dedup.Claim) {
	if !g.releaseOnFailure {
		return
	}
	if err := claim.Release(ctx); err != nil {
		g.logger.WarnContext(ctx, "dedup: the claim was not released", slog.Any("error", err))
	}
}
