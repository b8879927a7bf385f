package httpguard

import (
	"bytes"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// A stored result is one line followed by the body:
//
//	dedup-http/1 replay 200 application/json
//	{"paid": 5}
//
// "too-large" instead of "replay" has no body and cannot be replayed.
const (
	resultVersion = "dedup-http/1"
	wordReplay    = "replay"
	wordTooLarge  = "too-large"
)

// response is the stored part of a response.
type response struct {
	status      int
	contentType string
	body        []byte
}

func (r response) encode() []byte {
	return append(fmt.Appendf(nil, "%s %s %d %s\n", resultVersion, wordReplay, r.status, r.contentType), r.body...)
}

func encodeTooLarge(status int) []byte {
	return fmt.Appendf(nil, "%s %s %d \n", resultVersion, wordTooLarge, status)
}

// decode returns the stored response. It returns false if the result cannot be replayed.
func decode(result []byte) (response, bool) {
	head, body, ok := bytes.Cut(result, []byte("\n"))
	words := strings.SplitN(string(head), " ", 4)
	if !ok || len(words) != 4 || words[0] != resultVersion || words[1] != wordReplay {
		return response{}, false
	}
	status, err := strconv.Atoi(words[2])
	if err != nil || status < 200 || status > 999 {
		return response{}, false
	}
	return response{status: status, contentType: words[3], body: body}, true
}

// replay writes the stored response.
func (r response) replay(w http.ResponseWriter) {
	if r.contentType != "" {
		w.Header().Set("Content-Type", r.contentType)
	}
	w.Header().Set(ReplayedHeader, "true")
	w.WriteHeader(r.status)
	_, _ = w.Write(r.body)
}

// recorder buffers a response until it is recorded or exceeds the limit.
type recorder struct {
	to     http.ResponseWriter
	limit  int
	status int // 0 until the handler sets it
	body   bytes.Buffer
	passed bool // the buffer has been written; later writes go to the caller
}

// Header returns the header of the underlying response.
func (r *recorder) Header() http.Header { return r.to.Header() }

// WriteHeader records the first final status.
func (r *recorder) WriteHeader(status int) {
	if status >= 100 && status < 200 && status != http.StatusSwitchingProtocols {
		r.to.WriteHeader(status) // Informational: the response follows.
	} else if r.status == 0 {
		r.status = status
	}
}

// Write buffers the body up to the limit, then passes it through.
func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	if r.passed {
		return r.to.Write(p)
	}
	r.sniff(p)
	r.body.Write(p)
	if len(r.response().encode()) > r.limit {
		r.flush()
	}
	return len(p), nil
}

// sniff detects the content type as net/http does, so the replay has the same one.
func (r *recorder) sniff(p []byte) {
	if _, set := r.Header()["Content-Type"]; !set && r.body.Len() == 0 && len(p) > 0 && r.Header().Get("Content-Encoding") == "" {
		r.Header().Set("Content-Type", http.DetectContentType(p))
	}
}

func (r *recorder) response() response {
	// A line break would end the line of the result. net/http does not send one either.
	contentType := strings.NewReplacer("\r", " ", "\n", " ").Replace(r.Header().Get("Content-Type"))
	return response{status: r.status, contentType: contentType, body: r.body.Bytes()}
}

// result returns the result to store.
func (r *recorder) result() []byte {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	if result := r.response().encode(); !r.passed && len(result) <= r.limit {
		return result
	}
	return encodeTooLarge(r.status)
}

// flush writes the buffered response.
func (r *recorder) flush() {
	if r.passed {
		return
	}
	r.passed = true
	r.to.WriteHeader(max(r.status, http.StatusOK))
	if r.body.Len() > 0 {
		_, _ = r.to.Write(r.body.Bytes())
	}
}
