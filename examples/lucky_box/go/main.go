// Command lucky_box is the lucky box API in Go. It pays one reward per click, if its guard works.
//
// It listens on a free port and logs JSON lines, with the port, to standard error.
package main

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/redis/go-redis/v9"
	"google.golang.org/grpc/metadata"

	dedup "github.com/dedup-service/dedup-service/clients/go"
)

const correlationHeader = "x-correlation-id"

func main() {
	kind := flag.String("guard", "", "legacy or sidecar")
	port := flag.Int("redis", 0, "port of the Redis for the legacy guard")
	target := flag.String("sidecar", "", "target of the dedup service")
	flag.Parse()
	slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{ReplaceAttr: eventFirst})))
	chosen, err := newGuard(*kind, *port, *target)
	if err != nil {
		slog.Error("refused", "error", err.Error())
		os.Exit(2)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		slog.Error("refused", "error", err.Error())
		os.Exit(1)
	}
	slog.Info("serving", "port", listener.Addr().(*net.TCPAddr).Port)
	err = http.Serve(listener, newAPI(chosen))
	slog.Error("ended", "error", err.Error())
}

func newGuard(kind string, port int, target string) (guard, error) {
	switch kind {
	case "legacy":
		return legacyGuard{redis.NewClient(&redis.Options{Addr: net.JoinHostPort("127.0.0.1", strconv.Itoa(port))})}, nil
	case "sidecar":
		client, err := dedup.New(target)
		return sidecarGuard{client}, err
	default:
		return nil, fmt.Errorf("--guard is %q; it must be legacy or sidecar", kind)
	}
}

// click is the request body.
type click struct {
	Device int64  `json:"device"`
	Event  string `json:"event"`
	Day    string `json:"day"`
}

func newAPI(g guard) http.Handler {
	rewards := &promotions{begun: map[string]int{}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /api/benefit-promotions/{unit}/lucky-box", func(w http.ResponseWriter, r *http.Request) {
		begun := time.Now()
		correlationID := r.Header.Get(correlationHeader)
		if correlationID == "" {
			correlationID = rand.Text()
		}
		// The service logs under the same id.
		ctx := metadata.AppendToOutgoingContext(r.Context(), correlationHeader, correlationID)
		passed, reward, err := openBox(r.WithContext(ctx), g, rewards)
		status, body := answer(reward, err)
		slog.Info("click", "correlation_id", correlationID, "started", float64(begun.UnixMicro())/1e6,
			"latency_ms", float64(time.Since(begun).Microseconds())/1e3, "passed", passed, "status", status)
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set(correlationHeader, correlationID)
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(body)
	})
	return mux
}

// openBox reports whether the guard let the click pass, and the reward.
func openBox(r *http.Request, g guard, rewards *promotions) (passed bool, reward int, err error) {
	var who click
	if err := json.NewDecoder(r.Body).Decode(&who); err != nil {
		return false, 0, errBadRequest
	}
	id, err := dedup.TransactionID("lucky_box", strconv.FormatInt(who.Device, 10), r.PathValue("unit"), who.Event, who.Day)
	if err != nil {
		return false, 0, errBadRequest
	}
	finish, err := g.admit(r.Context(), id)
	if err != nil {
		return false, 0, err
	}
	reward, err = rewards.pay(id)
	finish(r.Context(), err)
	return true, reward, err
}

var errBadRequest = errors.New("bad request")

func answer(reward int, err error) (int, map[string]any) {
	switch {
	case err == nil:
		return http.StatusOK, map[string]any{"reward": reward}
	case errors.Is(err, errMultipleClick):
		return http.StatusConflict, map[string]any{"error": "multiple_click"}
	case errors.Is(err, errConflict):
		return http.StatusConflict, map[string]any{"error": "conflict"}
	case errors.Is(err, errBadRequest):
		return http.StatusBadRequest, map[string]any{"error": "bad_request"}
	default:
		// Perhaps a duplicate: pay nothing and do not answer 409.
		return http.StatusServiceUnavailable, map[string]any{"error": "guard_unavailable"}
	}
}

func eventFirst(_ []string, attr slog.Attr) slog.Attr {
	if attr.Key == slog.MessageKey {
		attr.Key = "event"
	}
	return attr
}
