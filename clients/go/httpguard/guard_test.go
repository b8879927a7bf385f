package httpguard_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/deduptest"
	"github.com/dedup-service/dedup-service/clients/go/httpguard"
	"github.com/dedup-service/dedup-service/clients/go/internal/servertest"
)

// serve starts a guarded handler.
func serve(t *testing.T, guard dedup.Guard, handler http.HandlerFunc, opts ...httpguard.Option) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(httpguard.New(guard, opts...)(handler))
	t.Cleanup(server.Close)
	return server
}

type reply struct {
	*http.Response
	body string
}

func post(t *testing.T, server *httptest.Server, key, body string) reply {
	t.Helper()
	request, err := http.NewRequest(http.MethodPost, server.URL+"/pay", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if key != "" {
		request.Header.Set(httpguard.KeyHeader, key)
	}
	response, err := server.Client().Do(request)
	if err != nil {
		return reply{&http.Response{}, err.Error()}
	}
	defer func() { _ = response.Body.Close() }()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{response, string(content)}
}

func wantProblem(t *testing.T, r reply, status int) map[string]any {
	t.Helper()
	var problem map[string]any
	if err := json.Unmarshal([]byte(r.body), &problem); err != nil {
		t.Fatalf("%d %q: %v", r.StatusCode, r.body, err)
	}
	if r.StatusCode != status || r.Header.Get("Content-Type") != "application/problem+json" || problem["status"] != float64(status) {
		t.Errorf("got %d %v %s, want %d", r.StatusCode, r.Header, r.body, status)
	}
	return problem
}

// pay counts its runs and answers each one differently.
func pay(runs *atomic.Int32) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		n := runs.Add(1)
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, `{"run": %d, "body": %q}`, n, body)
	}
}

// liveClient returns a client of the real service.
func liveClient(t *testing.T) *dedup.Client {
	t.Helper()
	server := servertest.Start(t, "sqlite:///"+filepath.Join(t.TempDir(), "claims.db"))
	client, err := dedup.New(server.Target, dedup.WithBudget(20*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func TestFirstResponseIsReplayed(t *testing.T) {
	for name, guard := range map[string]func(*testing.T) dedup.Guard{
		"fake": func(*testing.T) dedup.Guard { return deduptest.NewGuard() },
		"live": func(t *testing.T) dedup.Guard { return liveClient(t) },
	} {
		t.Run(name, func(t *testing.T) {
			var runs atomic.Int32
			server := serve(t, guard(t), pay(&runs))
			first := post(t, server, "k1", "5")
			if first.StatusCode != http.StatusCreated || first.Header.Get(httpguard.ReplayedHeader) != "" || first.body != `{"run": 1, "body": "5"}` {
				t.Errorf("first: %d %v %s", first.StatusCode, first.Header, first.body)
			}
			again := post(t, server, "k1", "5")
			if again.StatusCode != first.StatusCode || again.body != first.body ||
				again.Header.Get("Content-Type") != "application/json" || again.Header.Get(httpguard.ReplayedHeader) != "true" {
				t.Errorf("again: %d %v %s", again.StatusCode, again.Header, again.body)
			}
			wantProblem(t, post(t, server, "k1", "6"), http.StatusUnprocessableEntity)
			if other := post(t, server, "k2", "5"); other.body != `{"run": 2, "body": "5"}` {
				t.Errorf("another key: %s", other.body)
			}
		})
	}
}

func TestInProgressIsAConflictWithoutIDClaimantAndToken(t *testing.T) {
	begun, proceed := make(chan struct{}), make(chan struct{})
	guard := deduptest.NewGuard()
	server := serve(t, guard, func(w http.ResponseWriter, _ *http.Request) {
		close(begun)
		<-proceed
	}, httpguard.WithCallOptions(dedup.Claimant("anna"), dedup.Token("secret-0123456789")))
	first := make(chan reply)
	go func() { first <- post(t, server, "key-1", "") }()
	<-begun
	conflict := serve(t, guard, func(http.ResponseWriter, *http.Request) { t.Error("ran twice") })
	got := post(t, conflict, "key-1", "")
	wantProblem(t, got, http.StatusConflict)
	for _, private := range []string{"secret", "anna", "key-1", "/pay"} {
		if strings.Contains(got.body, private) {
			t.Errorf("%s is shown: %s", private, got.body)
		}
	}
	close(proceed)
	if r := <-first; r.StatusCode != http.StatusOK {
		t.Errorf("first: %d %s", r.StatusCode, r.body)
	}
	if again := post(t, conflict, "key-1", ""); again.StatusCode != http.StatusOK || again.Header.Get(httpguard.ReplayedHeader) != "true" {
		t.Errorf("an empty response is replayed: %d %v", again.StatusCode, again.Header)
	}
}

func TestConcurrentRequestsRunOnce(t *testing.T) {
	var runs, replayed atomic.Int32
	server := serve(t, deduptest.NewGuard(), pay(&runs), httpguard.WithCallOptions(dedup.Wait(time.Minute)))
	var all sync.WaitGroup
	for range 20 {
		all.Add(1)
		go func() {
			defer all.Done()
			got := post(t, server, "k", "5")
			if got.StatusCode != http.StatusCreated || got.body != `{"run": 1, "body": "5"}` {
				t.Errorf("got %d %s", got.StatusCode, got.body)
			}
			if got.Header.Get(httpguard.ReplayedHeader) == "true" {
				replayed.Add(1)
			}
		}()
	}
	all.Wait()
	if runs.Load() != 1 || replayed.Load() != 19 {
		t.Errorf("%d runs and %d replays", runs.Load(), replayed.Load())
	}
}

func TestLargeResponseIsCompleteAndNotReplayed(t *testing.T) {
	large := bytes.Repeat([]byte("x"), 5000)
	server := serve(t, deduptest.NewGuard(), func(w http.ResponseWriter, _ *http.Request) {
		for part := large; len(part) > 0; part = part[1000:] {
			_, _ = w.Write(part[:1000])
		}
	})
	if first := post(t, server, "k", ""); first.StatusCode != http.StatusOK || first.body != string(large) {
		t.Errorf("first: %d, %d bytes", first.StatusCode, len(first.body))
	}
	wantProblem(t, post(t, server, "k", ""), http.StatusGone)
}

func TestStreamedResponsePassesThroughAndIsNotReplayed(t *testing.T) {
	proceed := make(chan struct{})
	server := serve(t, deduptest.NewGuard(), func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("first "))
		w.(http.Flusher).Flush()
		<-proceed
		_, _ = w.Write([]byte("second"))
	})
	request, _ := http.NewRequest(http.MethodPost, server.URL+"/pay", nil)
	request.Header.Set(httpguard.KeyHeader, "k")
	response, err := server.Client().Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	part := make([]byte, len("first "))
	if _, err := io.ReadFull(response.Body, part); err != nil || string(part) != "first " {
		t.Errorf("before the end: %q, %v", part, err)
	}
	close(proceed)
	if rest, err := io.ReadAll(response.Body); err != nil || string(rest) != "second" {
		t.Errorf("the rest: %q, %v", rest, err)
	}
	wantProblem(t, post(t, server, "k", ""), http.StatusGone)
}

func TestDoubtKeepsTheClaim(t *testing.T) {
	for name, fail := range map[string]func(http.ResponseWriter){
		"5xx":   func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) },
		"panic": func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			var runs atomic.Int32
			guard := deduptest.NewGuard()
			server := serve(t, guard, func(w http.ResponseWriter, _ *http.Request) {
				if runs.Add(1) == 1 {
					fail(w)
				}
			})
			if first := post(t, server, "k", ""); first.StatusCode == http.StatusOK {
				t.Errorf("first: %d", first.StatusCode)
			}
			wantProblem(t, post(t, server, "k", ""), http.StatusConflict)
			guard.Service.Advance(time.Hour)
			if later := post(t, server, "k", ""); later.StatusCode != http.StatusOK {
				t.Errorf("after the claim expired: %d", later.StatusCode)
			}
		})
	}
}

func TestRejectedRequestMayBeCorrectedUnderItsKey(t *testing.T) {
	for _, status := range []int{400, 401, 402, 422, 429} {
		var runs atomic.Int32
		handler := func(w http.ResponseWriter, _ *http.Request) {
			if runs.Add(1) == 1 {
				w.WriteHeader(status)
			}
		}
		server := serve(t, deduptest.NewGuard(), handler)
		if first := post(t, server, "k", "wrong"); first.StatusCode != status {
			t.Errorf("%d: first %d", status, first.StatusCode)
		}
		if second := post(t, server, "k", "right"); second.StatusCode != http.StatusOK || second.Header.Get(httpguard.ReplayedHeader) != "" {
			t.Errorf("%d: corrected %d %s", status, second.StatusCode, second.body)
		}
		runs.Store(0)
		stored := serve(t, deduptest.NewGuard(), handler, httpguard.WithOutcome(func(int) dedup.Outcome { return dedup.Complete }))
		post(t, stored, "k", "")
		if again := post(t, stored, "k", ""); again.StatusCode != status || again.Header.Get(httpguard.ReplayedHeader) != "true" {
			t.Errorf("%d, completed by the predicate: %d", status, again.StatusCode)
		}
	}
}

func TestHandlerThatGaveUpKeepsTheClaim(t *testing.T) {
	guard := deduptest.NewGuard()
	begun := make(chan struct{})
	handler := httpguard.New(guard)(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(begun)
		<-r.Context().Done()
	}))
	ctx, cancel := context.WithCancel(t.Context())
	r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/pay", nil)
	r.Header.Set(httpguard.KeyHeader, "k")
	go func() {
		<-begun
		cancel()
	}()
	handler.ServeHTTP(httptest.NewRecorder(), r)
	if got, err := guard.Get(t.Context(), "http::POST:/pay:k"); err != nil || got.State != dedup.StateInProgress {
		t.Errorf("%v, %v", got, err)
	}
}

func TestResponseIsRecordedAfterTheCallerHasLeft(t *testing.T) {
	guard := deduptest.NewGuard()
	ctx, cancel := context.WithCancel(t.Context())
	r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/pay", nil)
	r.Header.Set(httpguard.KeyHeader, "k")
	httpguard.New(guard)(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		cancel()
		_, _ = w.Write([]byte("paid"))
	})).ServeHTTP(httptest.NewRecorder(), r)
	if got, err := guard.Get(t.Context(), "http::POST:/pay:k"); err != nil || got.State != dedup.StateCompleted {
		t.Errorf("%v, %v", got, err)
	}
}

func TestHandlerHearsOfTheLostClaim(t *testing.T) {
	guard := deduptest.NewGuard()
	cause := make(chan error, 1)
	server := serve(t, guard, func(_ http.ResponseWriter, r *http.Request) {
		guard.Service.Advance(time.Hour) // The claim expires.
		select {
		case <-r.Context().Done():
		case <-time.After(30 * time.Second):
		}
		cause <- context.Cause(r.Context())
	}, httpguard.WithCallOptions(dedup.TTL(300*time.Millisecond)))
	wantProblem(t, post(t, server, "k", ""), http.StatusConflict)
	if err := <-cause; !errors.Is(err, dedup.ErrClaimLost) {
		t.Error(err)
	}
}

func TestLongHandlerKeepsItsClaim(t *testing.T) {
	t.Parallel()
	client := liveClient(t)
	const ttl = 6 * time.Second // A busy machine has 4 s to extend the claim.
	var runs atomic.Int32
	begun := make(chan struct{})
	server := serve(t, client, func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		close(begun)
		servertest.Eventually(t, "work of 2.5 ttl", func() bool {
			got, err := client.Get(r.Context(), "http::POST:/pay:k")
			return err != nil || got.ExpireTime.Sub(got.ClaimTime) >= 7*ttl/2
		})
		_, _ = w.Write([]byte("paid"))
	}, httpguard.WithCallOptions(dedup.TTL(ttl)))
	first := make(chan reply)
	go func() { first <- post(t, server, "k", "") }()
	<-begun
	for {
		select {
		case r := <-first:
			if again := post(t, server, "k", ""); r.body != "paid" || again.body != "paid" || runs.Load() != 1 {
				t.Errorf("%d %s, again %d %s, %d runs", r.StatusCode, r.body, again.StatusCode, again.body, runs.Load())
			}
			return
		case <-time.After(20 * time.Millisecond):
			if r := post(t, server, "k", ""); r.StatusCode != http.StatusConflict && r.body != "paid" {
				t.Errorf("meanwhile: %d %s", r.StatusCode, r.body)
			}
		}
	}
}

func TestWithoutKeepAliveTheClaimExpires(t *testing.T) {
	guard := deduptest.NewGuard()
	server := serve(t, guard, func(_ http.ResponseWriter, r *http.Request) {
		guard.Service.Advance(time.Hour)
		time.Sleep(100 * time.Millisecond) // Longer than the ttl: time for an extension to fail.
		if r.Context().Err() != nil {
			t.Error(context.Cause(r.Context()))
		}
	}, httpguard.WithCallOptions(dedup.TTL(50*time.Millisecond)), httpguard.WithoutKeepAlive())
	if r := post(t, server, "k", ""); r.StatusCode != http.StatusOK {
		t.Errorf("%d %s", r.StatusCode, r.body)
	}
}

func TestOptions(t *testing.T) {
	var runs atomic.Int32
	t.Run("methods", func(t *testing.T) {
		server := serve(t, deduptest.NewGuard(), pay(&runs), httpguard.WithMethods(http.MethodPut), httpguard.RequireKey())
		for range 2 {
			if r := post(t, server, "k", ""); r.Header.Get(httpguard.ReplayedHeader) != "" {
				t.Error("POST is guarded")
			}
		}
	})
	t.Run("caller", func(t *testing.T) {
		guard := deduptest.NewGuard()
		for _, caller := range []string{"anna", "ben"} {
			server := serve(t, guard, pay(&runs), httpguard.WithCaller(func(*http.Request) string { return caller }))
			if r := post(t, server, "k", ""); r.Header.Get(httpguard.ReplayedHeader) != "" {
				t.Errorf("%s receives the response of another", caller)
			}
		}
	})
	t.Run("mounts", func(t *testing.T) {
		guard := deduptest.NewGuard()
		mounted := func(prefix string) http.Handler {
			return http.StripPrefix(prefix, httpguard.New(guard)(pay(&runs)))
		}
		for _, prefix := range []string{"/v1", "/v2"} {
			r := httptest.NewRequest(http.MethodPost, prefix+"/pay", nil)
			r.Header.Set(httpguard.KeyHeader, "k")
			mounted(prefix).ServeHTTP(httptest.NewRecorder(), r)
			if _, err := guard.Get(t.Context(), "http::POST:"+prefix+"/pay:k"); err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("fingerprint", func(t *testing.T) {
		server := serve(t, deduptest.NewGuard(), pay(&runs), httpguard.WithFingerprintBody(func(_ *http.Request, body []byte) []byte {
			return bytes.TrimSpace(body)
		}))
		post(t, server, "k", "5")
		if r := post(t, server, "k", " 5 "); r.Header.Get(httpguard.ReplayedHeader) != "true" {
			t.Errorf("%d %s", r.StatusCode, r.body)
		}
	})
	t.Run("replayed header", func(t *testing.T) {
		for _, name := range []string{"X-Replayed", ""} {
			server := serve(t, deduptest.NewGuard(), pay(&runs), httpguard.WithReplayedHeader(name))
			post(t, server, "k", "")
			r := post(t, server, "k", "")
			if r.Header.Get(httpguard.ReplayedHeader) != "" || name != "" && r.Header.Get(name) != "true" {
				t.Errorf("%q: %v", name, r.Header)
			}
		}
	})
	t.Run("retention", func(t *testing.T) {
		guard := deduptest.NewGuard()
		post(t, serve(t, guard, pay(&runs), httpguard.WithRetention(time.Hour)), "k", "")
		got, err := guard.Get(t.Context(), "http::POST:/pay:k")
		if err != nil || !got.ExpireTime.Equal(got.CompletionTime.Add(time.Hour)) {
			t.Errorf("completed %v, expires %v, %v", got.CompletionTime, got.ExpireTime, err)
		}
	})
}

func TestResponseTheServiceRejectsIsCompletedWithoutIt(t *testing.T) {
	client := liveClient(t)
	server := serve(t, client, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(make([]byte, 5000))
	}, httpguard.WithMaxResultBytes(10_000)) // More than the service keeps.
	post(t, server, "k", "")
	wantProblem(t, post(t, server, "k", ""), http.StatusGone)
}

func TestUnavailableServiceIs503AndNeverRunsTheHandler(t *testing.T) {
	guard := deduptest.NewGuard(dedup.WithBudget(20 * time.Millisecond))
	guard.Service.SetUnavailable(true)
	var runs atomic.Int32
	if r := post(t, serve(t, guard, pay(&runs)), "k", ""); r.Header.Get("Retry-After") == "" {
		t.Errorf("no Retry-After: %v", r.Header)
	} else {
		wantProblem(t, r, http.StatusServiceUnavailable)
	}
	if runs.Load() != 0 {
		t.Error("the handler ran")
	}
	open := serve(t, guard, pay(&runs), httpguard.WithCallOptions(dedup.OnUnavailable(dedup.Allow)))
	if r := post(t, open, "k", ""); r.StatusCode != http.StatusCreated || runs.Load() != 1 {
		t.Errorf("fail open: %d %s", r.StatusCode, r.body)
	}
}

func TestRequestWithoutKey(t *testing.T) {
	var runs atomic.Int32
	server := serve(t, deduptest.NewGuard(), pay(&runs))
	post(t, server, "", "")
	if r := post(t, server, "", ""); r.StatusCode != http.StatusCreated || runs.Load() != 2 {
		t.Errorf("unguarded: %d after %d runs", r.StatusCode, runs.Load())
	}
	wantProblem(t, post(t, serve(t, deduptest.NewGuard(), pay(&runs), httpguard.RequireKey()), "", ""), http.StatusBadRequest)
}

func TestRejectedRequests(t *testing.T) {
	var runs atomic.Int32
	guard := deduptest.NewGuard()
	fail := func(*http.Request) (string, error) { return "", errors.New("no") }
	control := func(*http.Request) (string, error) { return "\x01", nil }
	wantProblem(t, post(t, serve(t, guard, pay(&runs)), strings.Repeat("x", 600), ""), http.StatusBadRequest)
	wantProblem(t, post(t, serve(t, guard, pay(&runs), httpguard.WithKey(fail)), "", ""), http.StatusBadRequest)
	wantProblem(t, post(t, serve(t, guard, pay(&runs), httpguard.WithKey(control)), "", ""), http.StatusBadRequest)
	wantProblem(t, post(t, serve(t, guard, pay(&runs), httpguard.WithMaxBodyBytes(3)), "k", "1234"), http.StatusRequestEntityTooLarge)
	badTTL := httpguard.WithCallOptions(dedup.TTL(-1 * time.Second))
	wantProblem(t, post(t, serve(t, guard, pay(&runs), badTTL), "k", ""), http.StatusServiceUnavailable)
	if runs.Load() != 0 {
		t.Errorf("the handler ran %d times", runs.Load())
	}
}

func TestCompletionByOtherCodeIsNotReplayed(t *testing.T) {
	guard := deduptest.NewGuard()
	for i, result := range []string{"", "paid 5", "dedup-http/1 replay 20 \n", "dedup-http/3 200 replay\n\n", "dedup-http/1 replay x \n"} {
		id := fmt.Sprint(i)
		claim, err := guard.Claim(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if err := claim.Complete(t.Context(), []byte(result)); err != nil {
			t.Fatal(err)
		}
		key := httpguard.WithKey(func(*http.Request) (string, error) { return id, nil })
		wantProblem(t, post(t, serve(t, guard, func(http.ResponseWriter, *http.Request) { t.Error("ran") }, key), "", ""), http.StatusGone)
	}
}

func TestClaimTheHandlerEndedIsLeftAlone(t *testing.T) {
	var runs atomic.Int32
	server := serve(t, deduptest.NewGuard(), func(w http.ResponseWriter, r *http.Request) {
		runs.Add(1)
		if err := dedup.FromContext(r.Context()).Release(r.Context()); err != nil {
			t.Error(err)
		}
		_, _ = w.Write([]byte("nothing was done"))
	})
	for range 2 {
		if r := post(t, server, "k", ""); r.body != "nothing was done" || r.Header.Get(httpguard.ReplayedHeader) != "" {
			t.Errorf("%d %s", r.StatusCode, r.body)
		}
	}
	if runs.Load() != 2 {
		t.Errorf("%d runs", runs.Load())
	}
}

func TestFailOpenIsMarkedForTheHandler(t *testing.T) {
	guard := deduptest.NewGuard(dedup.WithBudget(20 * time.Millisecond))
	guard.Service.SetUnavailable(true)
	server := serve(t, guard, func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprint(w, dedup.FromContext(r.Context()).FailOpen)
	}, httpguard.WithCallOptions(dedup.OnUnavailable(dedup.Allow)))
	if r := post(t, server, "k", ""); r.body != "true" {
		t.Errorf("%d %s", r.StatusCode, r.body)
	}
}
