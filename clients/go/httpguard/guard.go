// Package httpguard runs net/http handlers at most once per idempotency key.
//
//	guarded := httpguard.New(client)(handler)
//
// A request with the header Idempotency-Key claims a transaction before the handler runs:
//
//   - The first request runs the handler. Its response is stored.
//   - While it is in progress, duplicates receive 409 with the holder in a problem-details body.
//   - Afterwards, duplicates receive the first response with the header Idempotency-Replayed: true.
//   - The same key with a different body receives 422.
//   - While the dedup service is unavailable, requests receive 503.
//
// Requests without the header are not guarded unless [RequireKey] is set. If callers must not receive each other's
// responses, include the authenticated caller in the transaction id with [WithKey], because callers choose their keys.
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
	// KeyHeader is the header with the idempotency key of a request.
	KeyHeader = "Idempotency-Key"
	// ReplayedHeader is "true" on a replayed response.
	ReplayedHeader = "Idempotency-Replayed"

	defaultMaxResultBytes = 4096
	defaultMaxBodyBytes   = 1 << 20
)

// Option configures the middleware.
type Option func(*guard)

// KeyFunc returns the transaction id of a request; build it with dedup.TransactionID. An empty id means no key. An
// error is answered with 400.
type KeyFunc func(*http.Request) (id string, err error)

// WithKey sets the transaction id of a request. The default consists of the method, the path and the header
// Idempotency-Key.
func WithKey(key KeyFunc) Option { return func(g *guard) { g.key = key } }

// RequireKey rejects requests without a key with 400.
func RequireKey() Option { return func(g *guard) { g.requireKey = true } }

// WithMaxResultBytes sets the size limit of a stored response, including its status and content type. The default is
// 4,096, as in the service. A larger response is not stored; later requests with its key receive 409.
func WithMaxResultBytes(n int) Option { return func(g *guard) { g.maxResultBytes = n } }

// WithMaxBodyBytes sets the size limit of a guarded request's body. The default is 1 MiB. A larger body is answered
// with 413.
func WithMaxBodyBytes(n int64) Option { return func(g *guard) { g.maxBodyBytes = n } }

// ReleaseOnFailure releases the claim if the handler panics or answers 5xx, so a retry runs at once. Use it only if
// such a failure means that the work had no effect. By default the claim expires, and retries receive 409 until then.
func ReleaseOnFailure() Option { return func(g *guard) { g.releaseOnFailure = true } }

// WithCallOptions adds options of each claim, such as dedup.TTL, dedup.Wait and dedup.OnUnavailable.
func WithCallOptions(opts ...dedup.CallOption) Option {
	return func(g *guard) { g.callOptions = append(g.callOptions, opts...) }
}

// WithLogger sets the logger for failed completions and releases. The default is slog.Default().
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
// The middleware buffers the response until it is recorded or exceeds the size limit. A caller that receives a stored
// response can therefore rely on its replay. The handler cannot flush or hijack.
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

// ServeHTTP handles one guarded request.
func (g *guard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id, err := g.key(r)
	switch {
	case err != nil:
		writeProblem(w, problem{Status: http.StatusBadRequest, Title: "The idempotency key is invalid", Detail: err.Error()})
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

// run runs the handler and records its response.
func (g *guard) run(w http.ResponseWriter, r *http.Request, claim *dedup.Claim) {
	// Record the result even if the caller has disconnected.
	ctx := context.WithoutCancel(r.Context())
	recorder := &recorder{to: w, limit: g.maxResultBytes}
	ended := false
	defer func() {
		if !ended { // A panic, which continues.
			g.failed(ctx, claim)
		}
	}()
	g.next.ServeHTTP(recorder, r)
	ended = true
	if recorder.status >= http.StatusInternalServerError {
		g.failed(ctx, claim)
	} else if err := claim.Complete(ctx, recorder.result()); err != nil {
		// The work is done. Later requests receive 409 until the claim expires.
		g.logger.WarnContext(ctx, "dedup: the response was not recorded", slog.Any("error", err))
	}
	recorder.flush()
}

// failed releases the claim if ReleaseOnFailure is set.
func (g *guard) failed(ctx context.Context, claim *dedup.Claim) {
	if !g.releaseOnFailure {
		return
	}
	if err := claim.Release(ctx); err != nil {
		g.logger.WarnContext(ctx, "dedup: the claim was not released", slog.Any("error", err))
	}
}
