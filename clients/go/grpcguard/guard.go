// Package grpcguard makes unary gRPC handlers do the work of each idempotency key at most once.
//
//	grpc.NewServer(grpc.UnaryInterceptor(grpcguard.UnaryServerInterceptor(client)))
//
// A call with the metadata idempotency-key claims a transaction before its handler runs:
//
//   - The first runs the handler, and its reply or error is kept.
//   - While it runs, others get ABORTED, with the reason DUPLICATE in google.rpc.ErrorInfo.
//   - Afterwards others get the first reply or error again, with the header metadata idempotency-replayed: true.
//   - The same key with another request gets INVALID_ARGUMENT, and UNAVAILABLE when the dedup service is unavailable.
//
// Calls without the metadata go to the handler unguarded. The key is the caller's word, so where callers must not see
// each other's replies a [WithKey] function has to put the caller into the transaction id.
package grpcguard

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	dedup "github.com/dedup-service/dedup-service/clients/go"
)

const (
	// KeyMetadata is where a caller puts the key of a call.
	KeyMetadata = "idempotency-key"
	// ReplayedMetadata is "true" in the header of a reply that is not the first of its kind.
	ReplayedMetadata = "idempotency-replayed"
	// Domain is the domain of the ErrorInfo of a refused call.
	Domain = "dedup.guard"

	// ReasonDuplicate is the reason when the first call is in progress.
	ReasonDuplicate = "DUPLICATE"
	// ReasonNotKept is the reason when the first call was completed, and its reply was not kept.
	ReasonNotKept = "REPLY_NOT_KEPT"
	// ReasonPayloadMismatch is the reason when the key was used for another request.
	ReasonPayloadMismatch = "PAYLOAD_MISMATCH"
	// ReasonUnavailable is the reason when duplicates cannot be told apart now.
	ReasonUnavailable = "DEDUP_UNAVAILABLE"

	defaultMaxResultBytes = 4096
)

// Option sets how calls are guarded.
type Option func(*guard)

// KeyFunc returns the transaction id of a call, best made by dedup.TransactionID. An empty id means that the call has
// no key, and goes unguarded; an error is answered as it is.
type KeyFunc func(ctx context.Context, fullMethod string, request any) (id string, err error)

// WithKey sets what names the transaction of a call. The default is made of the method and the metadata
// idempotency-key.
func WithKey(key KeyFunc) Option { return func(g *guard) { g.key = key } }

// WithMaxResultBytes sets how large a reply may be to be kept and replayed; the default is 4,096, as in the service.
func WithMaxResultBytes(n int) Option { return func(g *guard) { g.maxResultBytes = n } }

// ReleaseOnFailure gives the claim back when the handler panics or fails for a reason of its own, so that a retry runs
// at once. Use it only where such an end means that nothing was done: otherwise the claim is left to expire.
func ReleaseOnFailure() Option { return func(g *guard) { g.releaseOnFailure = true } }

// WithCallOptions sets options of each claim, such as dedup.TTL, dedup.Wait and dedup.OnUnavailable.
func WithCallOptions(opts ...dedup.CallOption) Option {
	return func(g *guard) { g.callOptions = append(g.callOptions, opts...) }
}

// WithLogger sets where a reply that could not be recorded is logged; the default is slog.Default().
func WithLogger(l *slog.Logger) Option { return func(g *guard) { g.logger = l } }

type guard struct {
	dedup            dedup.Guard
	key              KeyFunc
	maxResultBytes   int
	releaseOnFailure bool
	callOptions      []dedup.CallOption
	logger           *slog.Logger
}

// UnaryServerInterceptor returns an interceptor that guards the unary calls of a server.
func UnaryServerInterceptor(client dedup.Guard, opts ...Option) grpc.UnaryServerInterceptor {
	g := &guard{dedup: client, key: keyOfMetadata, maxResultBytes: defaultMaxResultBytes, logger: slog.Default()}
	for _, opt := range opts {
		opt(g)
	}
	return g.intercept
}

func keyOfMetadata(ctx context.Context, fullMethod string, _ any) (string, error) {
	values := metadata.ValueFromIncomingContext(ctx, KeyMetadata)
	if len(values) == 0 || values[0] == "" {
		return "", nil
	}
	id, err := dedup.TransactionID("grpc", fullMethod, values[0])
	if err != nil {
		return "", status.Error(codes.InvalidArgument, err.Error())
	}
	return id, nil
}

func (g *guard) intercept(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	id, err := g.key(ctx, info.FullMethod, request)
	if err != nil {
		return nil, err
	}
	if id == "" {
		return handler(ctx, request)
	}
	options := g.callOptions
	if fingerprint := fingerprintOf(request); fingerprint != nil {
		options = append([]dedup.CallOption{dedup.Fingerprint(fingerprint)}, options...)
	}
	claim, err := g.dedup.Claim(ctx, id, options...)
	if err != nil {
		return g.refuse(ctx, err)
	}
	return g.run(ctx, request, handler, claim)
}

// fingerprintOf is the digest of a request, and nil for one that is no protobuf message.
func fingerprintOf(request any) []byte {
	message, ok := request.(proto.Message)
	if !ok {
		return nil
	}
	// Equal requests must have equal bytes, also where they hold maps.
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		return nil
	}
	sum := sha256.Sum256(encoded)
	return sum[:]
}

// run lets the handler work, and records how it ended.
func (g *guard) run(ctx context.Context, request any, handler grpc.UnaryHandler, claim *dedup.Claim) (any, error) {
	// Whether the work was done does not depend on whether the caller still listens.
	after := context.WithoutCancel(ctx)
	ended := false
	defer func() {
		if !ended { // By a panic, which goes on.
			g.failed(after, claim)
		}
	}()
	reply, err := handler(ctx, request)
	ended = true
	if failedItself(status.Code(err)) {
		g.failed(after, claim)
		return reply, err
	}
	if completeErr := claim.Complete(after, encode(reply, err, g.maxResultBytes)); completeErr != nil {
		// The work is done and its caller is told so. Until the claim expires later calls are refused as duplicates.
		g.logger.WarnContext(ctx, "dedup: the reply was not recorded", slog.Any("error", completeErr))
	}
	return reply, err
}

// failedItself reports whether a handler failed for a reason of its own, as 5xx does over HTTP, and not for what it
// was asked: such an error says nothing about the next call, and is not replayed.
func failedItself(code codes.Code) bool {
	switch code {
	case codes.OK, codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.PermissionDenied,
		codes.Unauthenticated, codes.FailedPrecondition, codes.OutOfRange:
		return false
	default:
		return true
	}
}

// failed gives the claim back where that was asked for.
func (g *guard) failed(ctx context.Context, claim *dedup.Claim) {
	if !g.releaseOnFailure {
		return
	}
	if err := claim.Release(ctx); err != nil {
		g.logger.WarnContext(ctx, "dedup: the claim was not released", slog.Any("error", err))
	}
}

// refuse answers a call that may not run, by the first reply where it was kept.
func (g *guard) refuse(ctx context.Context, err error) (any, error) {
	var duplicate *dedup.DuplicateError
	switch {
	case errors.As(err, &duplicate):
		if duplicate.Transaction.State != dedup.StateCompleted {
			return nil, refusal(codes.Aborted, ReasonDuplicate, "a call with this idempotency key is in progress")
		}
		if reply, replyErr, ok := decode(duplicate.Transaction.Result); ok {
			// It fails only where there is no stream, and then nobody would read the header.
			_ = grpc.SetHeader(ctx, metadata.Pairs(ReplayedMetadata, "true"))
			return reply, replyErr
		}
		return nil, refusal(codes.Aborted, ReasonNotKept, "a call with this idempotency key was completed, and its reply was not kept")
	case errors.Is(err, dedup.ErrPayloadMismatch):
		return nil, refusal(codes.InvalidArgument, ReasonPayloadMismatch, "the idempotency key was used for another request")
	case errors.Is(err, context.Canceled):
		return nil, status.FromContextError(context.Canceled).Err()
	case errors.Is(err, dedup.ErrUnavailable):
		return nil, refusal(codes.Unavailable, ReasonUnavailable, "duplicates cannot be told apart now; the call was not run")
	default:
		return nil, status.Error(codes.Internal, "duplicates cannot be told apart")
	}
}

func refusal(code codes.Code, reason, message string) error {
	s, err := status.New(code, message).WithDetails(&errdetails.ErrorInfo{Domain: Domain, Reason: reason})
	if err != nil {
		return status.Error(code, message)
	}
	return s.Err()
}
