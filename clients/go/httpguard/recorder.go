package httpguard

import (
	"bytes"
	"mime"
	"net/http"
)

// recorder buffers a response until it is recorded, exceeds the limit or is streamed.
type recorder struct {
	to     http.ResponseWriter
	limit  int
	stored []string // names of headers
	status int      // 0 until the handler sets it
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
	r.sniff(p)
	r.final()
	if r.passed {
		return r.to.Write(p)
	}
	r.body.Write(p)
	if r.body.Len() > r.limit || r.isEventStream() {
		r.flush()
	}
	return len(p), nil
}

// isEventStream reports whether the parts of the response must not wait for each other.
func (r *recorder) isEventStream() bool {
	media, _, _ := mime.ParseMediaType(r.Header().Get("Content-Type"))
	return media == "text/event-stream"
}

// Flush passes the response through, so it is not stored.
func (r *recorder) Flush() {
	r.final()
	r.flush()
	if flusher, ok := r.to.(http.Flusher); ok {
		flusher.Flush()
	}
}

// sniff detects the content type as net/http does, so the replay has the same one.
func (r *recorder) sniff(p []byte) {
	header := r.Header()
	if _, set := header["Content-Type"]; !set && r.body.Len() == 0 && !r.passed && len(p) > 0 && header.Get("Content-Encoding") == "" {
		header.Set("Content-Type", http.DetectContentType(p))
	}
}

// final sets the status of a handler that did not.
func (r *recorder) final() {
	if r.status == 0 {
		r.WriteHeader(http.StatusOK)
	}
}

// result returns the result to store.
func (r *recorder) result() []byte {
	return encode(r.status, r.Header(), r.stored, r.body.Bytes(), r.limit, r.passed)
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
