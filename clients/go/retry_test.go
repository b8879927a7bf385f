package dedup_test

import (
	"context"
	"encoding/base64"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// script is a service that answers with the functions of a test and records the claims.
type script struct {
	dedupv1.DedupServiceClient

	mu       sync.Mutex
	requests []*dedupv1.ClaimTransactionRequest
	claim    func(ctx context.Context, attempt int) (*dedupv1.ClaimTransactionResponse, error)
	release  func(attempt int) (*dedupv1.ReleaseTransactionResponse, error)
	complete func() (*dedupv1.CompleteTransactionResponse, error)
	released int
}

func (s *script) ClaimTransaction(ctx context.Context, r *dedupv1.ClaimTransactionRequest, _ ...grpc.CallOption) (*dedupv1.ClaimTransactionResponse, error) {
	s.mu.Lock()
	s.requests = append(s.requests, proto.Clone(r).(*dedupv1.ClaimTransactionRequest)) // A snapshot of what was sent.
	attempt := len(s.requests)
	s.mu.Unlock()
	return s.claim(ctx, attempt)
}

func (s *script) ReleaseTransaction(context.Context, *dedupv1.ReleaseTransactionRequest, ...grpc.CallOption) (*dedupv1.ReleaseTransactionResponse, error) {
	s.mu.Lock()
	s.released++
	released := s.released
	s.mu.Unlock()
	if s.release == nil {
		return &dedupv1.ReleaseTransactionResponse{Outcome: dedupv1.ReleaseOutcome_RELEASE_OUTCOME_NOT_HELD}, nil
	}
	return s.release(released)
}

func (s *script) CompleteTransaction(context.Context, *dedupv1.CompleteTransactionRequest, ...grpc.CallOption) (*dedupv1.CompleteTransactionResponse, error) {
	return s.complete()
}

func scripted(t *testing.T, s *script, opts ...dedup.Option) *dedup.Client {
	t.Helper()
	client, err := dedup.NewFromStub(s, append([]dedup.Option{
		dedup.WithBudget(20 * time.Second), dedup.WithBackoff(time.Microsecond, time.Millisecond),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// serviceError returns an error with the details of the service.
func serviceError(code codes.Code, reason, applied string, retry ...time.Duration) error {
	details := []protoadapt.MessageV1{
		&errdetails.ErrorInfo{Domain: "dedup.v1", Reason: reason, Metadata: map[string]string{"applied": applied}},
	}
	for _, delay := range retry {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(delay)})
	}
	s, err := status.New(code, "scripted").WithDetails(details...)
	if err != nil {
		panic(err)
	}
	return s.Err()
}

func granted() (*dedupv1.ClaimTransactionResponse, error) {
	return &dedupv1.ClaimTransactionResponse{Outcome: dedupv1.ClaimOutcome_CLAIM_OUTCOME_CLAIMED}, nil
}

func TestRetriesRepeatTheTokenOfTheirCall(t *testing.T) {
	failures := []error{
		serviceError(codes.Unavailable, "STORE_UNREACHABLE", "no", time.Millisecond),
		status.Error(codes.Unavailable, "made by gRPC"),
		serviceError(codes.ResourceExhausted, "TOO_MANY_CALLS", "no", 0),
		serviceError(codes.DeadlineExceeded, "DEADLINE_PASSED", "unknown"),
		status.Error(codes.Canceled, "cancelled by a server shutdown"),
	}
	s := &script{claim: func(_ context.Context, attempt int) (*dedupv1.ClaimTransactionResponse, error) {
		if i := (attempt - 1) % (len(failures) + 1); i < len(failures) {
			return nil, failures[i]
		}
		return granted()
	}}
	client := scripted(t, s)
	seen := map[string]bool{}
	for range 3 {
		s.requests = nil
		claim := mustClaim(t, client, "x")
		if len(s.requests) != len(failures)+1 {
			t.Fatalf("%d attempts, want %d", len(s.requests), len(failures)+1)
		}
		token := s.requests[0].GetClaimToken()
		for i, r := range s.requests {
			if r.GetClaimToken() != token || claim.Token != token {
				t.Errorf("attempt %d has the token %q, the first %q, the claim %q", i+1, r.GetClaimToken(), token, claim.Token)
			}
		}
		if random, err := base64.RawURLEncoding.DecodeString(token); err != nil || len(random) != 16 {
			t.Errorf("token %q: %d bytes, %v", token, len(random), err)
		}
		if seen[token] {
			t.Errorf("two calls share the token %q", token)
		}
		seen[token] = true
	}
}

func TestNonRetryableErrorIsReturnedAtOnce(t *testing.T) {
	for name, failure := range map[string]error{
		"refused":  serviceError(codes.Unavailable, "STORE_REFUSED", "no"),
		"invalid":  serviceError(codes.InvalidArgument, "INVALID_REQUEST", "no"),
		"key":      serviceError(codes.FailedPrecondition, "KEY_OF_ANOTHER_TYPE", "no"),
		"internal": serviceError(codes.Internal, "INTERNAL", "unknown"),
	} {
		s := &script{claim: func(context.Context, int) (*dedupv1.ClaimTransactionResponse, error) { return nil, failure }}
		_, err := scripted(t, s).Claim(ctx, "x")
		var e *dedup.Error
		if !errors.As(err, &e) || e.Attempts != 1 || len(s.requests) != 1 || status.Code(err) != status.Code(failure) {
			t.Errorf("%s: %d attempts, %v", name, len(s.requests), err)
		}
		if got, want := errors.Is(err, dedup.ErrUnavailable), name == "refused"; got != want {
			t.Errorf("%s is unavailable: %v, want %v", name, got, want)
		}
	}
}

func TestReplyWithoutOutcomeIsNeverGranted(t *testing.T) {
	for name, reply := range map[string]*dedupv1.ClaimTransactionResponse{
		"empty":   {},
		"unknown": {Outcome: 99},
		"nil":     nil,
	} {
		for _, policy := range []dedup.Policy{dedup.Deny, dedup.Allow} {
			s := &script{claim: func(context.Context, int) (*dedupv1.ClaimTransactionResponse, error) { return reply, nil }}
			claim, err := scripted(t, s).Claim(ctx, "x", dedup.OnUnavailable(policy))
			var e *dedup.Error
			if claim != nil || !errors.Is(err, dedup.ErrUnavailable) || !errors.As(err, &e) || e.Reason != dedup.ReasonOutcomeUnspecified {
				t.Errorf("%s, policy %d: %+v, %v", name, policy, claim, err)
			}
		}
	}
}

func TestAppliedIsUnknownIfAnyAttemptIs(t *testing.T) {
	for first, want := range map[string]dedup.Applied{"no": dedup.AppliedNo, "unknown": dedup.AppliedUnknown} {
		s := &script{claim: func(_ context.Context, attempt int) (*dedupv1.ClaimTransactionResponse, error) {
			if attempt == 1 {
				return nil, serviceError(codes.Unavailable, "STORE_TIMEOUT", first, 0)
			}
			return nil, serviceError(codes.Unavailable, "STORE_REFUSED", "no")
		}}
		_, err := scripted(t, s).Claim(ctx, "x")
		var e *dedup.Error
		if !errors.As(err, &e) || e.Applied != want || e.Reason != "STORE_REFUSED" || e.Attempts != 2 {
			t.Errorf("first %s: %v", first, err)
		}
	}
}

func TestNoRetryIfThePauseExceedsTheBudget(t *testing.T) {
	s := &script{claim: func(context.Context, int) (*dedupv1.ClaimTransactionResponse, error) {
		return nil, serviceError(codes.Unavailable, "STORE_LOADING", "no", time.Hour)
	}}
	if _, err := scripted(t, s).Claim(ctx, "x"); !errors.Is(err, dedup.ErrUnavailable) || len(s.requests) != 1 {
		t.Errorf("%d attempts, %v", len(s.requests), err)
	}
}

func TestNoAttemptOutlastsTheBudget(t *testing.T) {
	const short = 60 * time.Millisecond
	for name, limit := range map[string]struct {
		ctx    time.Duration // 0: no deadline
		budget time.Duration
	}{
		"context":                {short, time.Hour},
		"budget":                 {0, short},
		"budget before deadline": {time.Hour, short},
	} {
		ctx := ctx
		if limit.ctx > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, limit.ctx)
			defer cancel()
		}
		var deadlines []time.Time
		s := &script{claim: func(ctx context.Context, _ int) (*dedupv1.ClaimTransactionResponse, error) {
			deadline, _ := ctx.Deadline()
			deadlines = append(deadlines, deadline)
			<-ctx.Done()
			return nil, status.FromContextError(ctx.Err()).Err()
		}}
		client := scripted(t, s, dedup.WithBudget(limit.budget), dedup.WithAttemptTimeout(short/3))
		before := time.Now()
		_, err := client.Claim(ctx, "x")
		var e *dedup.Error
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, dedup.ErrUnavailable) || !errors.As(err, &e) {
			t.Fatalf("%s: %v", name, err)
		}
		if e.Attempts != len(s.requests) || e.Applied != dedup.AppliedUnknown {
			t.Errorf("%s: %d attempts were made, %+v", name, len(s.requests), e)
		}
		// No attempt has a deadline after the call's. The 10 s allow for a busy machine.
		for i, deadline := range deadlines {
			if deadline.IsZero() || deadline.After(before.Add(short+10*time.Second)) {
				t.Errorf("%s: attempt %d has the deadline %v, the call began at %v", name, i+1, deadline, before)
			}
			if limit, ok := ctx.Deadline(); ok && deadline.After(limit) {
				t.Errorf("%s: attempt %d has the deadline %v, after the context's %v", name, i+1, deadline, limit)
			}
		}
	}
}

func TestWithoutBudgetTheDeadlineOfTheContextIsTheBudget(t *testing.T) {
	deadline := time.Now().Add(time.Hour)
	for _, withDeadline := range []bool{true, false} {
		ctx := ctx
		if withDeadline {
			var cancel context.CancelFunc
			ctx, cancel = context.WithDeadline(ctx, deadline)
			defer cancel()
		}
		var left time.Duration
		s := &script{claim: func(ctx context.Context, _ int) (*dedupv1.ClaimTransactionResponse, error) {
			until, _ := ctx.Deadline()
			left = time.Until(until)
			return granted()
		}}
		mustClaimWith(ctx, t, scripted(t, s, dedup.WithBudget(0), dedup.WithAttemptTimeout(2*time.Hour)), "x", dedup.Wait(time.Second))
		if long := left > 3*time.Second; long != withDeadline {
			t.Errorf("with a deadline %v: %v left", withDeadline, left)
		}
	}
}

func TestCancelledCallIsNeitherRetriedNorGranted(t *testing.T) {
	for name, failure := range map[string]error{
		"during an attempt": status.Error(codes.Canceled, "context canceled"),
		"before a retry":    serviceError(codes.Unavailable, "STORE_TIMEOUT", "unknown", 0),
	} {
		ctx, cancel := context.WithCancel(ctx)
		s := &script{claim: func(context.Context, int) (*dedupv1.ClaimTransactionResponse, error) {
			cancel()
			return nil, failure
		}}
		claim, err := scripted(t, s).Claim(ctx, "x", dedup.OnUnavailable(dedup.Allow))
		if claim != nil || !errors.Is(err, context.Canceled) || len(s.requests) != 1 {
			t.Errorf("%s: %+v, %v after %d attempts", name, claim, err, len(s.requests))
		}
	}
}

func TestCallCancelledByTheServerIsUnavailable(t *testing.T) {
	s := &script{claim: func(context.Context, int) (*dedupv1.ClaimTransactionResponse, error) {
		return nil, status.Error(codes.Canceled, "cancelled by the server")
	}}
	_, err := scripted(t, s, dedup.WithBudget(50*time.Millisecond)).Claim(ctx, "x")
	if !errors.Is(err, dedup.ErrUnavailable) || errors.Is(err, context.Canceled) || len(s.requests) < 2 {
		t.Errorf("%v after %d attempts", err, len(s.requests))
	}
}

// hold is a service that answers claims only after release is closed.
type hold struct {
	dedupv1.UnimplementedDedupServiceServer
	asked, release chan struct{}
}

func (h *hold) ClaimTransaction(context.Context, *dedupv1.ClaimTransactionRequest) (*dedupv1.ClaimTransactionResponse, error) {
	h.asked <- struct{}{}
	<-h.release
	return granted()
}

func TestClosedClientDoesNotRetry(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &hold{asked: make(chan struct{}, 10), release: make(chan struct{})}
	server := grpc.NewServer()
	dedupv1.RegisterDedupServiceServer(server, h)
	go server.Serve(listener)
	defer server.Stop()
	defer close(h.release)
	client, err := dedup.New(listener.Addr().String(), dedup.WithBudget(20*time.Second), dedup.WithAttemptTimeout(20*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := client.Claim(ctx, "x", dedup.OnUnavailable(dedup.Allow))
		ended <- err
	}()
	<-h.asked
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	err = <-ended
	var e *dedup.Error
	if !errors.As(err, &e) || !errors.Is(err, dedup.ErrClosed) || errors.Is(err, context.Canceled) || e.Attempts != 1 || e.Applied != dedup.AppliedUnknown {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestUnavailableIsDeniedByDefaultAndGrantedWithAllow(t *testing.T) {
	var log strings.Builder
	s := &script{claim: func(context.Context, int) (*dedupv1.ClaimTransactionResponse, error) {
		return nil, serviceError(codes.Unavailable, "STORE_REFUSED", "no")
	}}
	client := scripted(t, s, dedup.WithLogger(slog.New(slog.NewTextHandler(&log, nil))))
	if claim, err := client.Claim(ctx, "private"); claim != nil || !errors.Is(err, dedup.ErrUnavailable) || errors.Is(err, dedup.ErrDuplicate) {
		t.Errorf("denied: %+v, %v", claim, err)
	}
	if log.Len() > 0 {
		t.Errorf("denying was logged: %s", log.String())
	}
	claim := mustClaim(t, client, "private", dedup.OnUnavailable(dedup.Allow), dedup.Namespace("pay"))
	if !claim.FailOpen || claim.Transaction.ID != "private" || claim.Transaction.Namespace != "pay" {
		t.Errorf("allowed: %+v", claim)
	}
	if got := log.String(); !strings.Contains(got, "level=WARN") || !strings.Contains(got, "STORE_REFUSED") || strings.Contains(got, "private") {
		t.Errorf("logged: %s", got)
	}
	// The script has no functions for these calls, so a call would panic.
	if err := claim.Complete(ctx, nil); err != nil {
		t.Error(err)
	}
	if err := claim.Release(ctx); err != nil {
		t.Error(err)
	}
	if end, err := claim.Extend(ctx, time.Minute); err != nil || !end.IsZero() {
		t.Error(end, err)
	}
	for _, call := range []string{"complete", "release", "extend"} {
		if !strings.Contains(log.String(), "nothing to "+call) {
			t.Errorf("%s did not log that it does nothing: %s", call, log.String())
		}
	}
}

func TestAllowDoesNotGrantAnsweredErrors(t *testing.T) {
	for _, failure := range []error{
		serviceError(codes.InvalidArgument, "INVALID_REQUEST", "no"),
		serviceError(codes.Internal, "INTERNAL", "unknown"),
	} {
		s := &script{claim: func(context.Context, int) (*dedupv1.ClaimTransactionResponse, error) { return nil, failure }}
		if claim, err := scripted(t, s).Claim(ctx, "x", dedup.OnUnavailable(dedup.Allow)); claim != nil || err == nil {
			t.Errorf("granted %+v after %v", claim, failure)
		}
	}
}

func TestNotHeldAfterALostReleaseReplyIsReleased(t *testing.T) {
	notHeld := &dedupv1.ReleaseTransactionResponse{Outcome: dedupv1.ReleaseOutcome_RELEASE_OUTCOME_NOT_HELD}
	for applied, want := range map[string]error{"unknown": nil, "no": dedup.ErrNotHeld} {
		s := &script{
			claim: func(context.Context, int) (*dedupv1.ClaimTransactionResponse, error) { return granted() },
			release: func(attempt int) (*dedupv1.ReleaseTransactionResponse, error) {
				if attempt == 1 {
					return nil, serviceError(codes.Unavailable, "STORE_CONNECTION_LOST", applied, 0)
				}
				return notHeld, nil
			},
		}
		if err := mustClaim(t, scripted(t, s), "x").Release(ctx); !errors.Is(err, want) {
			t.Errorf("applied %s: %v, want %v", applied, err, want)
		}
	}
}

func TestShadowDuplicateCompletesWithoutError(t *testing.T) {
	for _, shadow := range []bool{true, false} {
		s := &script{
			claim: func(context.Context, int) (*dedupv1.ClaimTransactionResponse, error) {
				reply, _ := granted()
				reply.ShadowDuplicate = shadow
				return reply, nil
			},
			complete: func() (*dedupv1.CompleteTransactionResponse, error) {
				return &dedupv1.CompleteTransactionResponse{Outcome: dedupv1.CompleteOutcome_COMPLETE_OUTCOME_NOT_HELD}, nil
			},
		}
		claim := mustClaim(t, scripted(t, s), "x")
		if claim.ShadowDuplicate != shadow {
			t.Errorf("claim: %+v", claim)
		}
		if err := claim.Complete(ctx, nil); errors.Is(err, dedup.ErrNotHeld) == shadow {
			t.Errorf("shadow %v: %v", shadow, err)
		}
	}
}

func TestGRPCRetriesAreDisabled(t *testing.T) {
	server := grpc.NewServer()
	service := &refusing{}
	dedupv1.RegisterDedupServiceServer(server, service)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	config := `{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.001s",
		"maxBackoff": "0.001s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`
	client := newClient(t, listener.Addr().String(), dedup.WithDialOptions(grpc.WithDefaultServiceConfig(config)))
	if _, err := client.Claim(ctx, "x"); !errors.Is(err, dedup.ErrUnavailable) {
		t.Fatal(err)
	}
	if service.calls != 1 {
		t.Errorf("%d calls reached the server, want 1", service.calls)
	}
}

// refusing counts calls and rejects them with an error that is not retryable.
type refusing struct {
	dedupv1.UnimplementedDedupServiceServer
	calls int
}

func (r *refusing) ClaimTransaction(context.Context, *dedupv1.ClaimTransactionRequest) (*dedupv1.ClaimTransactionResponse, error) {
	r.calls++
	return nil, serviceError(codes.Unavailable, "STORE_REFUSED", "no")
}

func TestInvalidOptionsAreRejected(t *testing.T) {
	for name, opt := range map[string]dedup.Option{
		"budget":  dedup.WithBudget(-1),
		"attempt": dedup.WithAttemptTimeout(0),
		"backoff": dedup.WithBackoff(time.Second, time.Millisecond),
	} {
		if _, err := dedup.New("127.0.0.1:1", opt); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func mustClaimWith(ctx context.Context, t *testing.T, guard dedup.Guard, id string, opts ...dedup.CallOption) *dedup.Claim {
	t.Helper()
	claim, err := guard.Claim(ctx, id, opts...)
	if err != nil {
		t.Fatalf("Claim: %v", err)
	}
	return claim
}
