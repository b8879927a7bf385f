package grpcguard_test

import (
	"context"
	"errors"
	"net"
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
}

func (h *handler) GetTransaction(_ context.Context, r *dedupv1.GetTransactionRequest) (*dedupv1.GetTransactionResponse, error) {
	run := h.runs.Add(1)
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
	if got := call(client, "k", "b"); status.Code(got.err) != codes.InvalidArgument || reasonOf(got.err) != grpcguard.ReasonPayloadMismatch {
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

func TestRequestErrorIsReplayed(t *testing.T) {
	client := serve(t, deduptest.NewGuard(), &handler{work: func(int32) error {
		return status.Error(codes.NotFound, "no such account")
	}})
	for _, replayed := range []bool{false, true} {
		got := call(client, "k", "a")
		if status.Code(got.err) != codes.NotFound || status.Convert(got.err).Message() != "no such account" || got.replayed != replayed {
			t.Errorf("got %+v", got)
		}
	}
}

func TestFailures(t *testing.T) {
	for name, fail := range map[string]func() error{
		"error": func() error { return errors.New("broken") },
		"panic": func() error { panic("broken") },
	} {
		for _, release := range []bool{true, false} {
			var opts []grpcguard.Option
			if release {
				opts = append(opts, grpcguard.ReleaseOnFailure())
			}
			guard := deduptest.NewGuard()
			client := serve(t, guard, &handler{work: func(run int32) error {
				if run == 1 {
					return fail()
				}
				return nil
			}}, opts...)
			if got := call(client, "k", "a"); got.err == nil {
				t.Errorf("%s: %+v", name, got)
			}
			again := call(client, "k", "a")
			if release && again.run != 2 {
				t.Errorf("%s, released: %+v", name, again)
			}
			if !release {
				if reasonOf(again.err) != grpcguard.ReasonDuplicate {
					t.Errorf("%s, not released: %+v", name, again)
				}
				guard.Service.Advance(time.Hour)
				if later := call(client, "k", "a"); later.run != 2 {
					t.Errorf("%s, expired: %+v", name, later)
				}
			}
		}
	}
}

func TestTooLargeReplyIsNotReplayed(t *testing.T) {
	client := serve(t, deduptest.NewGuard(), &handler{}, grpcguard.WithMaxResultBytes(30))
	if got := call(client, "k", "a"); got.run != 1 {
		t.Errorf("first: %+v", got)
	}
	if got := call(client, "k", "a"); status.Code(got.err) != codes.Aborted || reasonOf(got.err) != grpcguard.ReasonNotKept {
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
