package httpguard_test

import (
	"bytes"
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

func TestFirstResponseIsReplayed(t *testing.T) {
	live := func(t *testing.T) dedup.Guard {
		server := servertest.Start(t, "sqlite:///"+filepath.Join(t.TempDir(), "claims.db"))
		client, err := dedup.New(server.Target, dedup.WithBudget(20*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = client.Close() })
		return client
	}
	for name, guard := range map[string]func(*testing.T) dedup.Guard{
		"fake": func(*testing.T) dedup.Guard { return deduptest.NewGuard() },
		"live": live,
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

func TestInProgressIsAConflictWithTheHolderAndNoToken(t *testing.T) {
	begun, proceed := make(chan struct{}), make(chan struct{})
	guard := deduptest.NewGuard()
	server := serve(t, guard, func(w http.ResponseWriter, _ *http.Request) {
		close(begun)
		<-proceed
	}, httpguard.WithCallOptions(dedup.Claimant("anna"), dedup.Token("secret-0123456789")))
	first := make(chan reply)
	go func() { first <- post(t, server, "k", "") }()
	<-begun
	conflict := serve(t, guard, func(http.ResponseWriter, *http.Request) { t.Error("ran twice") }, httpguard.WithCallOptions())
	got := post(t, conflict, "k", "")
	holder, _ := wantProblem(t, got, http.StatusConflict)["transaction"].(map[string]any)
	if holder["id"] != "http:POST:/pay:k" || holder["claimant"] != "anna" || holder["state"] != "in progress" || holder["expire_time"] == nil {
		t.Errorf("holder: %v", holder)
	}
	if strings.Contains(got.body, "secret") {
		t.Errorf("the token is shown: %s", got.body)
	}
	close(proceed)
	if r := <-first; r.StatusCode != http.StatusOK {
		t.Errorf("first: %d %s", r.StatusCode, r.body)
	}
	if again := post(t, conflict, "k", ""); again.StatusCode != http.StatusOK || again.Header.Get(httpguard.ReplayedHeader) != "true" {
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
	problem := wantProblem(t, post(t, server, "k", ""), http.StatusConflict)
	if holder, _ := problem["transaction"].(map[string]any); holder["state"] != "completed" {
		t.Errorf("problem: %v", problem)
	}
}

func TestResponseAtTheSizeLimitIsReplayed(t *testing.T) {
	head := len("dedup-http/1 replay 200 text/plain\n")
	for size, replayed := range map[int]bool{4096 - head: true, 4097 - head: false} {
		server := serve(t, deduptest.NewGuard(), func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			_, _ = w.Write(bytes.Repeat([]byte("x"), size))
		})
		post(t, server, "k", "")
		if again := post(t, server, "k", ""); (again.StatusCode == http.StatusOK) != replayed {
			t.Errorf("%d bytes: %d", size, again.StatusCode)
		}
	}
}

func TestFailures(t *testing.T) {
	for name, fail := range map[string]func(http.ResponseWriter){
		"5xx":   func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) },
		"panic": func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
	} {
		for _, release := range []bool{true, false} {
			t.Run(fmt.Sprint(name, " released ", release), func(t *testing.T) {
				var opts []httpguard.Option
				if release {
					opts = append(opts, httpguard.ReleaseOnFailure())
				}
				var runs atomic.Int32
				guard := deduptest.NewGuard()
				server := serve(t, guard, func(w http.ResponseWriter, _ *http.Request) {
					if runs.Add(1) == 1 {
						fail(w)
					}
				}, opts...)
				if first := post(t, server, "k", ""); first.StatusCode == http.StatusOK {
					t.Errorf("first: %d", first.StatusCode)
				}
				again := post(t, server, "k", "")
				if release && (again.StatusCode != http.StatusOK || runs.Load() != 2) {
					t.Errorf("again: %d after %d runs", again.StatusCode, runs.Load())
				}
				if !release {
					wantProblem(t, again, http.StatusConflict)
					guard.Service.Advance(time.Hour)
					if later := post(t, server, "k", ""); later.StatusCode != http.StatusOK {
						t.Errorf("after the claim expired: %d", later.StatusCode)
					}
				}
			})
		}
	}
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
	wantProblem(t, post(t, serve(t, guard, pay(&runs), badTTL), "k", ""), http.StatusInternalServerError)
	if runs.Load() != 0 {
		t.Errorf("the handler ran %d times", runs.Load())
	}
}

func TestCompletionByOtherCodeIsAConflict(t *testing.T) {
	guard := deduptest.NewGuard()
	for i, result := range []string{"", "paid 5", "dedup-http/1 replay 20 \n", "dedup-http/2 replay 200 \n", "dedup-http/1 replay x \n"} {
		id := fmt.Sprint(i)
		claim, err := guard.Claim(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if err := claim.Complete(t.Context(), []byte(result)); err != nil {
			t.Fatal(err)
		}
		key := httpguard.WithKey(func(*http.Request) (string, error) { return id, nil })
		wantProblem(t, post(t, serve(t, guard, func(http.ResponseWriter, *http.Request) { t.Error("ran") }, key), "", ""), http.StatusConflict)
	}
}
