package httpguard

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/deduptest"
	"github.com/dedup-service/dedup-service/clients/go/internal/identity"
)

// golden is clients/golden/http.json, which every client implements.
type golden struct {
	Defaults struct {
		Methods        []string
		KeyHeader      string   `json:"key_header"`
		ReplayedHeader string   `json:"replayed_header"`
		MaxBodyBytes   int64    `json:"max_body_bytes"`
		MaxStoredBytes int      `json:"max_stored_bytes"`
		StoredHeaders  []string `json:"stored_headers"`
	}
	Keys []struct {
		Headers []string
		Key     string
	}
	InvalidKeys []struct {
		Headers []string
		Why     string
	} `json:"invalid_keys"`
	Identities []struct {
		Caller, Method, Target, Header, Path string
		TransactionID                        string `json:"transaction_id"`
	}
	InvalidIdentities []struct{ Method, Target, Header, Why, Detail string } `json:"invalid_identities"`
	Fingerprints      []struct {
		Method, Target, Fingerprint string
		Body                        []byte
	}
	Stored []struct {
		Name         string
		Status       int
		Headers      [][2]string
		Body         []byte
		ExtraHeaders []string `json:"extra_headers"`
		Limit        int
		Streamed     bool
		Stored       []byte
	}
	Streamed []struct {
		Name              string
		ContentType       string `json:"content_type"`
		Parts             []int
		Flushed, Streamed bool
	}
	Readable []struct {
		Name    string
		Stored  []byte
		Kind    string
		Status  int
		Headers [][2]string
		Body    []byte
	}
	Statuses []struct {
		Status int
		Does   string
	}
	Refusals []struct {
		Name    string
		Status  int
		Headers map[string]string
		Body    map[string]any
	}
	Redirect struct {
		Status  int
		Headers map[string]string
		Body    string
	}
}

func readGolden(t *testing.T) golden {
	t.Helper()
	data, err := os.ReadFile("../../golden/http.json")
	if err != nil {
		t.Fatal(err)
	}
	var g golden
	if err := json.Unmarshal(data, &g); err != nil {
		t.Fatal(err)
	}
	for name, n := range map[string]int{
		"keys": len(g.Keys), "invalid keys": len(g.InvalidKeys), "identities": len(g.Identities), "invalid identities": len(g.InvalidIdentities),
		"fingerprints": len(g.Fingerprints), "stored": len(g.Stored), "streamed": len(g.Streamed), "readable": len(g.Readable), "statuses": len(g.Statuses), "refusals": len(g.Refusals),
	} {
		if n == 0 {
			t.Fatalf("no %s", name)
		}
	}
	return g
}

func TestDefaultsMatchTheSharedFile(t *testing.T) {
	want := readGolden(t).Defaults
	g := New(deduptest.NewGuard())(nil).(*guard)
	var headers []string
	for _, name := range g.storedHeaders {
		headers = append(headers, strings.ToLower(name))
	}
	if !slices.Equal(g.methods, want.Methods) || KeyHeader != want.KeyHeader || g.replayedHeader != want.ReplayedHeader ||
		g.maxBodyBytes != want.MaxBodyBytes || g.maxResultBytes != want.MaxStoredBytes || !slices.Equal(headers, want.StoredHeaders) {
		t.Errorf("%+v, want %+v", g, want)
	}
}

func TestKeysMatchTheSharedFile(t *testing.T) {
	golden := readGolden(t)
	for _, c := range golden.Keys {
		if key, err := identity.Key(c.Headers); err != nil || key != c.Key {
			t.Errorf("%q: %q, %v, want %q", c.Headers, key, err, c.Key)
		}
	}
	for _, c := range golden.InvalidKeys {
		if key, err := identity.Key(c.Headers); err == nil {
			t.Errorf("%q (%s): %q", c.Headers, c.Why, key)
		}
	}
}

// idOf returns the transaction id of a request to a server, also below a mounted prefix.
func idOf(t *testing.T, g *guard, method, sent string, keys ...string) (string, error) {
	t.Helper()
	r := httptest.NewRequest(method, "/", nil)
	r.RequestURI = sent
	r.URL.Path = "/changed/by/a/mount"
	if len(keys) > 0 {
		r.Header[KeyHeader] = keys
	}
	id, _, err := g.identify(r)
	return id, err
}

func TestIdentitiesMatchTheSharedFile(t *testing.T) {
	golden := readGolden(t)
	for _, c := range golden.Identities {
		g := New(deduptest.NewGuard(), WithCaller(func(*http.Request) string { return c.Caller }))(nil).(*guard)
		for _, sent := range []string{c.Target, "http://example.com" + c.Target} {
			if id, err := idOf(t, g, c.Method, sent, c.Header); err != nil || id != c.TransactionID {
				t.Errorf("%s %s: %q, %v, want %q", c.Method, sent, id, err, c.TransactionID)
			}
		}
	}
	g := New(deduptest.NewGuard())(nil).(*guard)
	for _, c := range golden.InvalidIdentities {
		if id, err := idOf(t, g, c.Method, c.Target, c.Header); err == nil || detailOf(err) != c.Detail {
			t.Errorf("%s %s (%s): %q, %v", c.Method, c.Target, c.Why, id, err)
		}
		if id, err := idOf(t, g, c.Method, c.Target); err != nil || id != "" {
			t.Errorf("%s %s without a key: %q, %v", c.Method, c.Target, id, err)
		}
	}
}

func TestFingerprintsMatchTheSharedFile(t *testing.T) {
	for _, c := range readGolden(t).Fingerprints {
		target, err := targetOf(&http.Request{RequestURI: c.Target})
		got := fmt.Sprintf("%x", identity.Fingerprint([]byte(c.Method), []byte(target.path), []byte(target.query), c.Body))
		if err != nil || got != c.Fingerprint {
			t.Errorf("%s %s: %s, %v, want %s", c.Method, c.Target, got, err, c.Fingerprint)
		}
	}
}

// Each response is written by a handler, and read back from the service.
func TestStoredResponsesMatchTheSharedFile(t *testing.T) {
	for _, c := range readGolden(t).Stored {
		client := deduptest.NewGuard()
		handler := New(client, WithMaxResultBytes(c.Limit), WithStoredHeaders(c.ExtraHeaders...))(
			http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				for _, h := range c.Headers {
					w.Header().Add(h[0], h[1])
				}
				if len(c.Headers) == 0 || w.Header().Get("Content-Type") == "" {
					w.Header()["Content-Type"] = nil // No detection.
				}
				w.WriteHeader(c.Status)
				_, _ = w.Write(c.Body)
				if c.Streamed {
					w.(http.Flusher).Flush()
				}
			}))
		r := httptest.NewRequest(http.MethodPost, "/pay", nil)
		r.Header.Set(KeyHeader, "k")
		first := httptest.NewRecorder()
		handler.ServeHTTP(first, r)
		if first.Code != c.Status || first.Body.String() != string(c.Body) {
			t.Errorf("%s: the first response is %d %q", c.Name, first.Code, first.Body)
		}
		got, err := client.Get(t.Context(), "http::POST:/pay:k")
		if err != nil || string(got.Result) != string(c.Stored) {
			t.Errorf("%s: %v, stored\n%q, want\n%q", c.Name, err, got.Result, c.Stored)
		}
	}
}

// Each response is written in parts by a handler behind a real server, and requested twice.
func TestStreamedResponsesMatchTheSharedFile(t *testing.T) {
	for _, c := range readGolden(t).Streamed {
		size := 0
		for _, part := range c.Parts {
			size += part
		}
		server := httptest.NewServer(New(deduptest.NewGuard())(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", c.ContentType)
			for _, part := range c.Parts {
				_, _ = w.Write(make([]byte, part))
				if c.Flushed {
					w.(http.Flusher).Flush()
				}
			}
		})))
		for _, want := range []int{http.StatusOK, map[bool]int{false: http.StatusOK, true: http.StatusGone}[c.Streamed]} {
			r, err := http.NewRequest(http.MethodPost, server.URL+"/pay", nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set(KeyHeader, "k")
			got, err := server.Client().Do(r)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(got.Body)
			_ = got.Body.Close()
			if err != nil || got.StatusCode != want || want == http.StatusOK && len(body) != size {
				t.Errorf("%s: %d with %d bytes, %v, want %d", c.Name, got.StatusCode, len(body), err, want)
			}
		}
		server.Close()
	}
}

// net/http itself refuses an invalid escape, so no handler runs.
func TestInvalidEscapesNeverRunTheHandler(t *testing.T) {
	server := httptest.NewServer(New(deduptest.NewGuard())(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("ran")
	})))
	defer server.Close()
	for _, c := range readGolden(t).InvalidIdentities {
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: shop\r\nConnection: close\r\nIdempotency-Key: %s\r\n\r\n", c.Method, c.Target, c.Header)
		answer, err := io.ReadAll(conn)
		_ = conn.Close()
		if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 400 ") {
			t.Errorf("%s: %s, %v", c.Why, answer, err)
		}
	}
}

func headerOf(pairs [][2]string) http.Header {
	header := http.Header{}
	for _, h := range pairs {
		header.Add(h[0], h[1])
	}
	return header
}

func TestReadableResponsesMatchTheSharedFile(t *testing.T) {
	for _, c := range readGolden(t).Readable {
		got, ok := decode(c.Stored)
		if ok != (c.Kind != "unreadable") || got.replayable != (c.Kind == "replay") {
			t.Errorf("%s: %+v, %t, want %s", c.Name, got, ok, c.Kind)
			continue
		}
		if ok && got.status != c.Status || len(got.header)+len(c.Headers) > 0 && !reflect.DeepEqual(got.header, headerOf(c.Headers)) ||
			got.replayable && string(got.body) != string(c.Body) {
			t.Errorf("%s: %+v", c.Name, got)
		}
	}
}

func TestStatusesMatchTheSharedFile(t *testing.T) {
	names := map[string]dedup.Outcome{"complete": dedup.Complete, "release": dedup.Release, "keep": dedup.Keep}
	for _, c := range readGolden(t).Statuses {
		if want, known := names[c.Does]; !known || OutcomeOf(c.Status) != want {
			t.Errorf("%d: %v, want %s", c.Status, OutcomeOf(c.Status), c.Does)
		}
	}
}

// refusalOf returns the answer to a request that is refused for the named reason.
func refusalOf(t *testing.T, name string) *httptest.ResponseRecorder {
	t.Helper()
	client := deduptest.NewGuard()
	answer := func(w http.ResponseWriter, _ *http.Request) {}
	send := func(key, body string, opts ...Option) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodPost, "/pay", strings.NewReader(body))
		r.Header[KeyHeader] = []string{key}
		w := httptest.NewRecorder()
		New(client, opts...)(http.HandlerFunc(answer)).ServeHTTP(w, r)
		return w
	}
	switch name {
	case "in-progress":
		answer = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }
		send("k", "")
	case "response-not-stored":
		send("k", "", WithMaxResultBytes(1))
	case "redirect":
		answer = func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "/rewards/17")
			_, _ = w.Write(make([]byte, 5000))
		}
		send("k", "")
	case "key-reused":
		send("k", "")
		return send("k", "other")
	case "key-invalid":
		return send("a b", "")
	case "body-too-large":
		return send("k", "xx", WithMaxBodyBytes(1))
	case "unavailable":
		client = deduptest.NewGuard(dedup.WithBudget(20 * time.Millisecond))
		client.Service.SetUnavailable(true)
	default:
		t.Fatalf("unknown refusal %q", name)
	}
	return send("k", "")
}

func TestRefusalsMatchTheSharedFile(t *testing.T) {
	golden := readGolden(t)
	for _, c := range golden.Refusals {
		got := refusalOf(t, c.Name)
		var body map[string]any
		if err := json.Unmarshal(got.Body.Bytes(), &body); err != nil {
			t.Fatalf("%s: %d %s: %v", c.Name, got.Code, got.Body, err)
		}
		c.Body["detail"] = strings.ReplaceAll(c.Body["detail"].(string), "{limit}", "1")
		if got.Code != c.Status || !reflect.DeepEqual(body, c.Body) {
			t.Errorf("%s: %d %v, want %d %v", c.Name, got.Code, body, c.Status, c.Body)
		}
		wantHeaders(t, c.Name, got.Header(), c.Headers)
	}
	got := refusalOf(t, "redirect")
	if got.Code != golden.Redirect.Status || got.Body.String() != golden.Redirect.Body {
		t.Errorf("redirect: %d %s", got.Code, got.Body)
	}
	wantHeaders(t, "redirect", got.Header(), golden.Redirect.Headers)
}

func wantHeaders(t *testing.T, name string, got http.Header, want map[string]string) {
	t.Helper()
	for header, value := range want {
		if got.Get(header) != value {
			t.Errorf("%s: %s is %q, want %q", name, header, got.Get(header), value)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%s: headers %v, want %v", name, got, want)
	}
}
