package dedup

import (
	"context"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"
)

// unsentError is a failed call of which nothing was sent, such as after a refused connection.
type unsentError struct{ cause error }

func (e *unsentError) Error() string { return e.cause.Error() }

// tracked is a connection that marks the errors of calls that were not sent.
type tracked struct{ *grpc.ClientConn }

// Invoke implements [grpc.ClientConnInterface].
func (t tracked) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	p := &progress{}
	err := t.ClientConn.Invoke(context.WithValue(ctx, progressKey{}, p), method, args, reply, opts...)
	if err != nil && p.begun.Load() && !p.sent.Load() {
		return &unsentError{err}
	}
	return err
}

// progress is how far gRPC got with a call.
type progress struct{ begun, sent atomic.Bool }

type progressKey struct{}

// progressHandler records the progress of calls.
type progressHandler struct{}

func (progressHandler) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	if p, ok := ctx.Value(progressKey{}).(*progress); ok {
		p.begun.Store(true)
	}
	return ctx
}

func (progressHandler) HandleRPC(ctx context.Context, event stats.RPCStats) {
	if _, ok := event.(*stats.OutHeader); !ok {
		return
	}
	if p, ok := ctx.Value(progressKey{}).(*progress); ok {
		p.sent.Store(true)
	}
}

func (progressHandler) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

func (progressHandler) HandleConn(context.Context, stats.ConnStats) {}
