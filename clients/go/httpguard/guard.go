// Package httpguard runs net/http handlers at most once per idempotency key, by the HTTP profile of
// docs/client-contract.md.
//
//	guarded := httpguard.New(client)(handler)
//
// A POST or PATCH request with the header Idempotency-Key claims a transaction before the handler runs:
//
//   - The first request runs the handler. A 2xx or 3xx response is stored, a 4xx releases the claim, and after a 5xx or
//     a panic the claim is kept until it expires.
//   - While it is in progress, duplicates receive 409.
//   - Afterwards, duplicates receive the first response with the header Idempotency-Replayed: true. If it is not stored,
//     they receive 410, or 303 to its Location.
//   - The same key with a different request receives 422.
//   - While the dedup service is unavailable, requests receive 503.
//
// The claim is kept alive while the handler runs. If it is lost, the request's context ends and context.Cause returns
// dedup.ErrClaimLost. dedup.FromContext returns the claim, such as to see FailOpen; a claim the handler completes or
// releases is left alone.
package httpguard

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/internal/identity"
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

// WithKey sets the transaction id of a request. The default consists of the caller, the method, the path and the header
// Idempotency-Key.
func WithKey(key KeyFunc) Option { return func(g *guard) { g.key = key } }

// WithCaller adds the authenticated caller to the transaction id. Set it if callers must not receive each other's
// responses, because callers choose their keys.
func WithCaller(caller func(*http.Request) string) Option {
	return func(g *guard) { g.caller = caller }
}

// WithMethods sets the guarded methods. The default is POST and PATCH.
func WithMethods(methods ...string) Option { return func(g *guard) { g.methods = methods } }

// RequireKey rejects guarded requests without a key with 400.
func RequireKey() Option { return func(g *guard) { g.requireKey = true } }

// WithFingerprintBody sets what represents the body in the fingerprint, such as its canonical JSON.
func WithFingerprintBody(body func(r *http.Request, body []byte) []byte) Option {
	return func(g *guard) { g.fingerprintBody = body }
}

// WithStoredHeaders adds response headers to store and replay. Set-Cookie is never stored.
func WithStoredHeaders(names ...string) Option {
	return func(g *guard) { g.storedHeaders = append(g.storedHeaders, names...) }
}

// WithReplayedHeader renames the header Idempotency-Replayed. An empty name removes it.
func WithReplayedHeader(name string) Option { return func(g *guard) { g.replayedHeader = name } }

// WithMaxResultBytes sets the size limit of a stored response with its headers. The default is 4,096, as in the
// service.
func WithMaxResultBytes(n int) Option { return func(g *guard) { g.maxResultBytes = n } }

// WithMaxBodyBytes sets the size limit of a guarded request's body. The default is 1 MiB. A larger body is answered
// with 413.
func WithMaxBodyBytes(n int64) Option { return func(g *guard) { g.maxBodyBytes = n } }

// WithRetention sets how long a response is stored. The default is the namespace's.
func WithRetention(d time.Duration) Option { return func(g *guard) { g.retention = d } }

// WithOutcome sets what happens to the claim by the status of the response. The default is [OutcomeOf].
func WithOutcome(outcome func(status int) dedup.Outcome) Option {
	return func(g *guard) { g.outcome = outcome }
}

// OutcomeOf completes 2xx and 3xx, releases 4xx and keeps the claim for all others.
func OutcomeOf(status int) dedup.Outcome {
	switch {
	case status >= 200 && status < 400:
		return dedup.Complete
	case status >= 400 && status < 500:
		return dedup.Release
	default:
		return dedup.Keep
	}
}

// WithMaxHold limits how long the claim is kept alive. The default is 1 hour.
func WithMaxHold(d time.Duration) Option { return func(g *guard) { g.maxHold = dedup.MaxHold(d) } }

// WithoutKeepAlive lets the claim expire at the end of its ttl, even if the handler is running.
func WithoutKeepAlive() Option { return func(g *guard) { g.noKeepAlive = true } }

// WithCallOptions adds options of each claim, such as dedup.TTL, dedup.Wait and dedup.OnUnavailable.
func WithCallOptions(opts ...dedup.CallOption) Option {
	return func(g *guard) { g.callOptions = append(g.callOptions, opts...) }
}

// WithLogger sets the logger for failed claims, completions and releases. The default is slog.Default().
func WithLogger(l *slog.Logger) Option { return func(g *guard) { g.logger = l } }

type guard struct {
	dedup           dedup.Guard
	next            http.Handler
	key             KeyFunc // nil: by the contract
	caller          func(*http.Request) string
	methods         []string
	requireKey      bool
	fingerprintBody func(*http.Request, []byte) []byte
	storedHeaders   []string // canonical and sorted
	replayedHeader  string
	maxResultBytes  int
	maxBodyBytes    int64
	retention       time.Duration // 0: the namespace's
	outcome         func(int) dedup.Outcome
	maxHold         dedup.KeepAliveOption
	noKeepAlive     bool
	callOptions     []dedup.CallOption
	logger          *slog.Logger
}

// New returns middleware that guards a handler.
//
// The middleware buffers the response until it is recorded or exceeds the size limit. A caller that receives a stored
// response can therefore rely on its replay. A handler that calls Flush or writes an event stream streams: its response
// passes through and is not stored. The handler cannot hijack.
func New(client dedup.Guard, opts ...Option) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		g := &guard{
			dedup: client, next: next,
			caller:          func(*http.Request) string { return "" },
			methods:         []string{http.MethodPost, http.MethodPatch},
			fingerprintBody: func(_ *http.Request, body []byte) []byte { return body },
			storedHeaders:   slices.Clone(defaultStoredHeaders),
			replayedHeader:  ReplayedHeader,
			maxResultBytes:  defaultMaxResultBytes, maxBodyBytes: defaultMaxBodyBytes,
			outcome: OutcomeOf, maxHold: dedup.MaxHold(time.Hour), logger: slog.Default(),
		}
		for _, opt := range opts {
			opt(g)
		}
		g.storedHeaders = allowed(g.storedHeaders)
		return g
	}
}

// ServeHTTP handles one guarded request.
func (g *guard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !slices.Contains(g.methods, r.Method) {
		g.next.ServeHTTP(w, r)
		return
	}
	id, target, err := g.identify(r)
	switch {
	case err != nil:
		write(w, keyInvalid(detailOf(err)))
		return
	case id == "" && g.requireKey:
		write(w, keyInvalid(detailKey))
		return
	case id == "":
		g.next.ServeHTTP(w, r)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, g.maxBodyBytes))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		write(w, bodyTooLarge(g.maxBodyBytes))
		return
	} else if err != nil { // The caller has disconnected, or sent an invalid body.
		http.Error(w, "the body could not be read", http.StatusBadRequest)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	fingerprint := identity.Fingerprint([]byte(r.Method), []byte(target.path), []byte(target.query), g.fingerprintBody(r, body))
	claim, err := g.dedup.Claim(r.Context(), id, append([]dedup.CallOption{dedup.Fingerprint(fingerprint)}, g.callOptions...)...)
	if err != nil {
		g.refuse(w, r, err)
		return
	}
	g.run(w, r, claim)
}

// target is what the client asked for.
type target struct{ path, query string }

// targetOf returns the target as the client sent it: a mount such as http.StripPrefix changes only r.URL.
func targetOf(r *http.Request) (target, error) {
	sent := r.RequestURI
	if !strings.HasPrefix(sent, "/") {
		// The absolute form of a proxy, or a request made by hand.
		u := r.URL
		if parsed, err := url.Parse(sent); err == nil && sent != "" {
			u = parsed
		}
		sent = u.EscapedPath() + "?" + u.RawQuery
	}
	escaped, query, _ := strings.Cut(sent, "?")
	path, err := url.PathUnescape(escaped)
	if err != nil || !utf8.ValidString(path) {
		return target{}, errPath
	}
	return target{path, query}, nil
}

// identify returns the transaction id and the target. The id of a request without a key is empty.
func (g *guard) identify(r *http.Request) (id string, t target, err error) {
	if g.key != nil {
		if id, err = g.key(r); id != "" && err == nil {
			t, err = targetOf(r)
		}
		return id, t, err
	}
	values := r.Header.Values(KeyHeader)
	if len(values) == 0 {
		return "", t, nil
	}
	key, err := identity.Key(values)
	if err != nil {
		return "", t, err
	}
	if t, err = targetOf(r); err != nil {
		return "", t, err
	}
	if id, err = dedup.TransactionID("http", g.caller(r), r.Method, t.path, key); err != nil {
		err = errTooLong
	}
	return id, t, err
}

// run runs the handler and records its response. A panic continues and keeps the claim.
func (g *guard) run(w http.ResponseWriter, r *http.Request, claim *dedup.Claim) {
	ctx := r.Context()
	work := dedup.NewContext(ctx, claim)
	if !g.noKeepAlive {
		var stop context.CancelFunc
		work, stop = claim.KeepAlive(work, g.maxHold)
		defer stop()
	}
	r = r.WithContext(work)
	recorder := &recorder{to: w, limit: g.maxResultBytes, stored: g.storedHeaders}
	g.next.ServeHTTP(recorder, r)
	if claim.Ended() { // By the handler.
		recorder.flush()
		return
	}
	if recorder.status == 0 && work.Err() != nil {
		// The handler gave up without a response, which is not a success: its effect is unknown.
		write(w, inProgress)
		return
	}
	g.end(ctx, claim, recorder)
	recorder.flush()
}

// end completes or releases the claim by the status of the response.
func (g *guard) end(ctx context.Context, claim *dedup.Claim, response *recorder) {
	var err error
	switch response.final(); g.outcome(response.status) {
	case dedup.Complete:
		var opts []dedup.CompleteOption
		if g.retention > 0 {
			opts = append(opts, dedup.RetainFor(g.retention))
		}
		err = claim.Complete(ctx, response.result(), opts...)
	case dedup.Release:
		err = claim.Release(ctx)
	}
	if err != nil {
		// Later requests receive 409 until the claim expires.
		g.logger.WarnContext(ctx, "dedup: the outcome of the request was not recorded", slog.Any("error", err))
	}
}

// allowed returns the canonical names of headers to store, sorted.
func allowed(names []string) []string {
	var canonical []string
	for _, name := range names {
		if name = textproto.CanonicalMIMEHeaderKey(name); name != "Set-Cookie" {
			canonical = append(canonical, name)
		}
	}
	slices.Sort(canonical)
	return slices.Compact(canonical)
}
