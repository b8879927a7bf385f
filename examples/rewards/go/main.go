// Command rewards is the reward service with net/http and the guard. ../README.md describes its environment.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/httpguard"
)

const largeBytes = 10_000

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	name := getenv("NAME", "rewards-go")
	ledger, err := openLedger(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		return err
	}
	defer ledger.close()
	client, err := dedup.New(getenv("DEDUP_TARGET", "127.0.0.1:50051"), dedup.WithDefaults(dedup.Claimant(name)))
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	// With several users, also set WithCaller: it keeps their keys and responses apart.
	var options []httpguard.Option
	if seconds := os.Getenv("CLAIM_TTL"); seconds != "" {
		ttl, err := time.ParseDuration(seconds + "s")
		if err != nil {
			return err
		}
		options = append(options, httpguard.WithCallOptions(dedup.TTL(ttl)))
	}
	guarded := httpguard.New(client, options...)

	service := &service{ledger, name}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /rewards", service.pay)
	mux.HandleFunc("GET /rewards", service.paid)

	listener, err := net.Listen("tcp", "127.0.0.1:"+getenv("PORT", "0"))
	if err != nil {
		return err
	}
	fmt.Printf("listening on %s\n", listener.Addr())
	server := &http.Server{Handler: guarded(mux)}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
		// Finishes the requests in progress.
		return server.Shutdown(context.Background())
	}
}

type service struct {
	ledger ledger
	name   string
}

// order is the request body. ../README.md describes Simulate.
type order struct {
	Unit     string   `json:"unit"`
	Amount   int      `json:"amount"`
	Simulate string   `json:"simulate"`
	Seconds  *float64 `json:"seconds"`
}

// receipt is the response body.
type receipt struct {
	ID      int64  `json:"id"`
	Unit    string `json:"unit"`
	Amount  int    `json:"amount"`
	Padding string `json:"padding,omitempty"`
}

// pay pays a reward.
func (s *service) pay(w http.ResponseWriter, r *http.Request) {
	var ordered order
	if err := json.NewDecoder(r.Body).Decode(&ordered); err != nil || ordered.Amount <= 0 {
		// Nothing was paid: the guard releases the key after a 4xx, and the caller may correct the order under it.
		problem(w, http.StatusBadRequest, "amount is not a whole number above 0")
		return
	}
	// The context also ends when the claim is lost. Another process may pay from then on.
	ctx := r.Context()
	if ordered.Simulate == "slow" {
		seconds := 3.0
		if ordered.Seconds != nil {
			seconds = *ordered.Seconds
		}
		select {
		case <-time.After(time.Duration(seconds * float64(time.Second))):
		case <-ctx.Done():
		}
	}
	key := strings.Trim(r.Header.Get(httpguard.KeyHeader), `"`)
	number, err := s.ledger.pay(ctx, reward{Key: key, Unit: ordered.Unit, Amount: ordered.Amount, PaidBy: s.name})
	if err != nil {
		// The effect is unknown: the guard keeps the key after a 5xx.
		log.Print(err)
		problem(w, http.StatusInternalServerError, "the payment failed")
		return
	}
	if ordered.Simulate == "error" {
		problem(w, http.StatusInternalServerError, "the reward was paid, and then the service failed")
		return
	}
	paid := receipt{ID: number, Unit: ordered.Unit, Amount: ordered.Amount}
	if ordered.Simulate == "large" {
		paid.Padding = strings.Repeat("x", largeBytes)
	}
	w.Header().Set("Location", "/rewards/"+strconv.FormatInt(number, 10))
	w.Header().Set("ETag", fmt.Sprintf(`"reward-%d"`, number))
	// Belongs to one caller: the guard never stores it.
	http.SetCookie(w, &http.Cookie{Name: "served_by", Value: s.name, Path: "/"})
	send(w, http.StatusCreated, "application/json", paid)
}

// paid lists the rewards.
func (s *service) paid(w http.ResponseWriter, r *http.Request) {
	rewards, err := s.ledger.paid(r.Context())
	if err != nil {
		log.Print(err)
		problem(w, http.StatusInternalServerError, "the rewards could not be read")
		return
	}
	send(w, http.StatusOK, "application/json", rewards)
}

// problem sends a problem document (RFC 9457).
func problem(w http.ResponseWriter, status int, title string) {
	send(w, status, "application/problem+json", map[string]any{"type": "about:blank", "title": title, "status": status})
}

func send(w http.ResponseWriter, status int, contentType string, body any) {
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

func getenv(name, fallback string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return fallback
}
