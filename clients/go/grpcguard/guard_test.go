package grpcguard_test

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/deduptest"
	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
	"github.com/dedup-service/dedup-service/clients/go/grpcguard"
)

// handler is the guarded service of the tests. Only GetTransaction is implemented.
type handler struct {
	dedupv1.UnimplementedDedupServiceServer
	runs atomic.Int32
	work func(run int32) error
	wait func(context.Context) error
}

func (h *handler) GetTransaction(ctx context.Context, r *dedupv1.GetTransactionRequest) (*dedupv1.GetTransactionResponse, error) {
	run := h.runs.Add(1)
	if h.wait != nil {
		if err := h.wait(ctx); err != nil {
			return nil, err
		}
	}
	if h.work != nil {
		if err := h.work(run); err != nil {
			return nil, err
		}
	}
	return &dedupv1.GetTransactionResponse{
		Transaction: &dedupv1.Transaction{TransactionId: r.GetTransactionId(), Result: []byte{byte(run)}},
	}, nil
}

func serve(t *testing.T, guard dedup.Guard, h *handler, opts ...grpcguard.Option) dedupv1.DedupServiceClient {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	recoverPanics := func(ctx context.Context, r any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (reply any, err error) {
		defer func() {
			if recover() != nil {
				err = status.Error(codes.Internal, "panic")
			}
		}()
		return next(ctx, r)
	}
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(recoverPanics, grpcguard.UnaryServerInterceptor(guard, opts...)))
	dedupv1.RegisterDedupServiceServer(server, h)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return dedupv1.NewDedupServiceClient(conn)
}

type result struct {
	run      byte
	replayed bool
	err      error
}

func call(client dedupv1.DedupServiceClient, key, id string) result {
	ctx := context.Background()
	if key != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, grpcguard.KeyMetadata, key)
	}
	var header metadata.MD
	reply, err := client.GetTransaction(ctx, &dedupv1.GetTransactionRequest{TransactionId: id}, grpc.Header(&header))
	got := result{err: err, replayed: strings.Join(header.Get(grpcguard.ReplayedMetadata), ",") == "true"}
	if err == nil {
		got.run = reply.GetTransaction().GetResult()[0]
	}
	return got
}

func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == grpcguard.Domain {
			return info.GetReason()
		}
	}
	return ""
}

func TestFirstReplyIsReplayed(t *testing.T) {
	client := serve(t, deduptest.NewGuard(), &handler{})
	for i, want := range []result{{run: 1}, {run: 1, replayed: true}, {run: 1, replayed: true}} {
		if got := call(client, "k", "a"); got != want {
			t.Errorf("call %d: %+v, want %+v", i, got, want)
		}
	}
	if got := call(client, "k", "b"); status.Code(got.err) != codes.FailedPrecondition || reasonOf(got.err) != grpcguard.ReasonPayloadMismatch {
		t.Errorf("another request: %+v", got)
	}
	if got := call(client, "other", "a"); got.run != 2 {
		t.Errorf("another key: %+v", got)
	}
	if got := call(client, "", "a"); got.run != 3 || got.replayed {
		t.Errorf("no key: %+v", got)
	}
}

func TestInProgressIsAborted(t *testing.T) {
	begun, proceed := make(chan struct{}), make(chan struct{})
	client := serve(t, deduptest.NewGuard(), &handler{work: func(int32) error {
		close(begun)
		<-proceed
		return nil
	}})
	first := make(chan result)
	go func() { first <- call(client, "k", "a") }()
	<-begun
	if got := call(client, "k", "a"); status.Code(got.err) != codes.Aborted || reasonOf(got.err) != grpcguard.ReasonDuplicate {
		t.Errorf("second: %+v", got)
	}
	close(proceed)
	if got := <-first; got.err != nil {
		t.Error(got.err)
	}
}

func TestRejectedRequestMayBeCorrectedUnderItsKey(t *testing.T) {
	client := serve(t, deduptest.NewGuard(), &handler{work: func(run int32) error {
		if run == 1 {
			return status.Error(codes.InvalidArgument, "no such account")
		}
		return nil
	}})
	if got := call(client, "k", "wrong"); status.Code(got.err) != codes.InvalidArgument || reasonOf(got.err) != "" {
		t.Errorf("first: %+v", got)
	}
	if got := call(client, "k", "right"); got.run != 2 || got.replayed {
		t.Errorf("corrected: %+v", got)
	}
}

func TestOutcomePredicate(t *testing.T) {
	keep := grpcguard.WithOutcome(func(codes.Code) dedup.Outcome { return dedup.Keep })
	client := serve(t, deduptest.NewGuard(), &handler{work: func(int32) error { return status.Error(codes.NotFound, "no") }}, keep)
	call(client, "k", "a")
	if got := call(client, "k", "a"); reasonOf(got.err) != grpcguard.ReasonDuplicate {
		t.Errorf("second: %+v", got)
	}
}

func TestDoubtKeepsTheClaim(t *testing.T) {
	for name, fail := range map[string]func() error{
		"error": func() error { return errors.New("broken") },
		"panic": func() error { panic("broken") },
	} {
		guard := deduptest.NewGuard()
		client := serve(t, guard, &handler{work: func(run int32) error {
			if run == 1 {
				return fail()
			}
			return nil
		}})
		if got := call(client, "k", "a"); got.err == nil {
			t.Errorf("%s: %+v", name, got)
		}
		if again := call(client, "k", "a"); reasonOf(again.err) != grpcguard.ReasonDuplicate {
			t.Errorf("%s: %+v", name, again)
		}
		guard.Service.Advance(time.Hour)
		if later := call(client, "k", "a"); later.run != 2 {
			t.Errorf("%s, expired: %+v", name, later)
		}
	}
}

func TestHandlerHearsOfTheLostClaim(t *testing.T) {
	guard := deduptest.NewGuard()
	h := &handler{}
	h.wait = func(ctx context.Context) error {
		guard.Service.Advance(time.Hour) // The claim expires.
		select {
		case <-ctx.Done():
		case <-time.After(30 * time.Second):
		}
		if !errors.Is(context.Cause(ctx), dedup.ErrClaimLost) {
			t.Error(context.Cause(ctx))
		}
		return ctx.Err()
	}
	client := serve(t, guard, h, grpcguard.WithCallOptions(dedup.TTL(300*time.Millisecond)))
	if got := call(client, "k", "a"); got.err == nil {
		t.Errorf("%+v", got)
	}
}

func TestCallersDoNotShareReplies(t *testing.T) {
	guard := deduptest.NewGuard()
	for _, caller := range []string{"anna", "ben"} {
		client := serve(t, guard, &handler{}, grpcguard.WithCaller(func(context.Context) string { return caller }), grpcguard.WithRetention(time.Hour))
		if got := call(client, "k", "a"); got.run != 1 || got.replayed {
			t.Errorf("%s: %+v", caller, got)
		}
		stored, err := guard.Get(t.Context(), "grpc:"+caller+":/dedup.v1.DedupService/GetTransaction:k")
		if err != nil || !stored.ExpireTime.Equal(stored.CompletionTime.Add(time.Hour)) {
			t.Errorf("%s: %+v, %v", caller, stored, err)
		}
	}
}

func TestReplyInTheOlderFormIsReplayed(t *testing.T) {
	guard := deduptest.NewGuard()
	claim, err := guard.Claim(t.Context(), "grpc::/dedup.v1.DedupService/GetTransaction:k")
	if err != nil {
		t.Fatal(err)
	}
	reply, err := proto.Marshal(&dedupv1.GetTransactionResponse{Transaction: &dedupv1.Transaction{Result: []byte{7}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := claim.Complete(t.Context(), append([]byte{1}, reply...)); err != nil {
		t.Fatal(err)
	}
	if got := call(serve(t, guard, &handler{}), "k", "a"); got.run != 7 || !got.replayed {
		t.Errorf("%+v", got)
	}
}

func TestErrorInTheOlderFormIsNotKept(t *testing.T) {
	guard := deduptest.NewGuard()
	claim, err := guard.Claim(t.Context(), "grpc::/dedup.v1.DedupService/GetTransaction:k")
	if err != nil {
		t.Fatal(err)
	}
	if err := claim.Complete(t.Context(), []byte("dedup-grpc/1 error\n")); err != nil {
		t.Fatal(err)
	}
	if got := call(serve(t, guard, &handler{}), "k", "a"); status.Code(got.err) != codes.AlreadyExists || reasonOf(got.err) != grpcguard.ReasonNotKept {
		t.Errorf("%+v", got)
	}
}

func TestRefusalsMatchTheSharedFile(t *testing.T) {
	data, err := os.ReadFile("../../golden/grpc.json")
	if err != nil {
		t.Fatal(err)
	}
	var golden struct {
		Refusals []struct{ Name, Code, Reason string }
	}
	if err := json.Unmarshal(data, &golden); err != nil || len(golden.Refusals) == 0 {
		t.Fatal(golden, err)
	}
	for _, c := range golden.Refusals {
		var got result
		switch guard := deduptest.NewGuard(); c.Name {
		case "in progress":
			client := serve(t, guard, &handler{work: func(int32) error { return errors.New("broken") }})
			call(client, "k", "a")
			got = call(client, "k", "a")
		case "reply not stored":
			client := serve(t, guard, &handler{}, grpcguard.WithMaxResultBytes(30))
			call(client, "k", "a")
			got = call(client, "k", "a")
		case "another request":
			client := serve(t, guard, &handler{})
			call(client, "k", "a")
			got = call(client, "k", "b")
		case "unavailable":
			guard = deduptest.NewGuard(dedup.WithBudget(20 * time.Millisecond))
			guard.Service.SetUnavailable(true)
			got = call(serve(t, guard, &handler{}), "k", "a")
		case "invalid key":
			got = call(serve(t, guard, &handler{}), "a b", "a")
		default:
			t.Fatalf("unknown refusal %q", c.Name)
		}
		var want codes.Code
		if err := want.UnmarshalJSON([]byte(`"` + c.Code + `"`)); err != nil {
			t.Fatal(err)
		}
		if status.Code(got.err) != want || reasonOf(got.err) != c.Reason {
			t.Errorf("%s: %+v, want %s %s", c.Name, got, c.Code, c.Reason)
		}
	}
}

func TestTooLargeReplyIsNotReplayed(t *testing.T) {
	client := serve(t, deduptest.NewGuard(), &handler{}, grpcguard.WithMaxResultBytes(30))
	if got := call(client, "k", "a"); got.run != 1 {
		t.Errorf("first: %+v", got)
	}
	if got := call(client, "k", "a"); status.Code(got.err) != codes.AlreadyExists || reasonOf(got.err) != grpcguard.ReasonNotKept {
		t.Errorf("second: %+v", got)
	}
}

func TestUnavailableServiceNeverRunsTheHandler(t *testing.T) {
	guard := deduptest.NewGuard(dedup.WithBudget(20 * time.Millisecond))
	guard.Service.SetUnavailable(true)
	h := &handler{}
	client := serve(t, guard, h)
	if got := call(client, "k", "a"); status.Code(got.err) != codes.Unavailable || reasonOf(got.err) != grpcguard.ReasonUnavailable {
		t.Errorf("got %+v", got)
	}
	if h.runs.Load() != 0 {
		t.Error("the handler ran")
	}
	open := serve(t, guard, h, grpcguard.WithCallOptions(dedup.OnUnavailable(dedup.Allow)))
	if got := call(open, "k", "a"); got.run != 1 {
		t.Errorf("fail open: %+v", got)
	}
}

func TestClaimTheHandlerEndedIsLeftAlone(t *testing.T) {
	client := serve(t, deduptest.NewGuard(), &handler{wait: func(ctx context.Context) error {
		return dedup.FromContext(ctx).Release(ctx)
	}})
	for run := byte(1); run <= 2; run++ {
		if got := call(client, "k", "a"); got.run != run || got.replayed {
			t.Errorf("%+v, want run %d", got, run)
		}
	}
}
