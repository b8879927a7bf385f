package httpguard

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// A stored response has a first line, header lines, an empty line and the body:
//
//	dedup-http/2 201 replay
//	content-type: application/json
//
//	{"paid": 5}
//
// "no-body" instead of "replay" has only a location and cannot be replayed.
const (
	version    = "dedup-http/2"
	wordReplay = "replay"
	wordNoBody = "no-body"
)

// defaultStoredHeaders are canonical and sorted.
var defaultStoredHeaders = []string{
	"Content-Encoding", "Content-Language", "Content-Type", "Etag", "Link", "Location", "Retry-After",
}

// stored is a response as read.
type stored struct {
	status     int // 0 if unknown
	replayable bool
	header     http.Header
	body       []byte
}

// net/http sends values like this, too.
var lineBreaks = strings.NewReplacer("\r", " ", "\n", " ")

// head returns everything before the body. The names are canonical and sorted.
func head(status int, word string, header http.Header, names []string) []byte {
	encoded := fmt.Appendf(nil, "%s %d %s\n", version, status, word)
	for _, name := range names {
		for _, value := range header[name] {
			encoded = fmt.Appendf(encoded, "%s: %s\n", strings.ToLower(name), strings.Trim(lineBreaks.Replace(value), " \t"))
		}
	}
	return append(encoded, '\n')
}

// encode returns what to store of a response. A streamed one has no body.
func encode(status int, header http.Header, names []string, body []byte, limit int, streamed bool) []byte {
	encoded := append(head(status, wordReplay, header, names), body...)
	if !streamed && len(encoded) <= limit {
		return encoded
	}
	if encoded = head(status, wordNoBody, header, []string{"Location"}); len(encoded) <= limit {
		return encoded
	}
	return head(status, wordNoBody, nil, nil)
}

// decode reads a stored response, also in the two older formats. It returns false for a result of other code.
func decode(result []byte) (stored, bool) {
	switch {
	case bytes.HasPrefix(result, []byte(version+" ")):
		return decodeLines(result)
	case bytes.HasPrefix(result, []byte("dedup-http/1 ")):
		return decodeLine(result)
	case len(result) == 1 && result[0] == 1:
		return stored{}, true
	case len(result) > 0 && result[0] == 2:
		return decodeBinary(result)
	}
	return stored{}, false
}

func decodeLines(result []byte) (stored, bool) {
	first, rest, _ := bytes.Cut(result, []byte("\n"))
	words := strings.Split(string(first), " ")
	if len(words) != 3 || words[2] != wordReplay && words[2] != wordNoBody {
		return stored{}, false
	}
	status, ok := statusOf(words[1])
	if !ok {
		return stored{}, false
	}
	header := http.Header{}
	for {
		line, after, found := bytes.Cut(rest, []byte("\n"))
		if !found {
			return stored{}, false
		}
		rest = after
		if len(line) == 0 {
			return stored{status, words[2] == wordReplay, header, rest}, true
		}
		name, value, found := strings.Cut(string(line), ":")
		if !found {
			return stored{}, false
		}
		header.Add(name, strings.TrimPrefix(value, " "))
	}
}

// decodeLine reads "dedup-http/1 replay 200 text/plain", a line feed and the body.
func decodeLine(result []byte) (stored, bool) {
	first, body, found := bytes.Cut(result, []byte("\n"))
	words := strings.SplitN(string(first), " ", 4)
	if !found || len(words) != 4 {
		return stored{}, false
	}
	status, ok := statusOf(words[2])
	if !ok || words[1] != "replay" && words[1] != "too-large" {
		return stored{}, false
	}
	return stored{status, words[1] == "replay", contentType(words[3]), body}, true
}

// decodeBinary reads the byte 2, the status and the length of the content type, both in 2 bytes, the content type and
// the body.
func decodeBinary(result []byte) (stored, bool) {
	if len(result) < 5 {
		return stored{}, false
	}
	status, ok := statusOf(strconv.Itoa(int(binary.BigEndian.Uint16(result[1:]))))
	end := 5 + int(binary.BigEndian.Uint16(result[3:]))
	if !ok || len(result) < end {
		return stored{}, false
	}
	return stored{status, true, contentType(string(result[5:end])), result[end:]}, true
}

func contentType(value string) http.Header {
	if value == "" {
		return http.Header{}
	}
	return http.Header{"Content-Type": {value}}
}

func statusOf(word string) (int, bool) {
	status, err := strconv.Atoi(word)
	return status, err == nil && status >= 200 && status <= 999
}
