// Package grpcguard runs unary gRPC handlers at most once per idempotency key.
//
//	grpc.NewServer(grpc.UnaryInterceptor(grpcguard.UnaryServerInterceptor(client)))
//
// A call with the metadata idempotency-key claims a transaction before its handler runs:
//
//   - The first call runs the handler. Its reply or error is stored.
//   - While it is in progress, duplicates receive ABORTED with the reason DUPLICATE in google.rpc.ErrorInfo.
//   - Afterwards, duplicates receive the first reply or error with the header metadata idempotency-replayed: true.
//   - The same key with a different request receives INVALID_ARGUMENT.
//   - While the dedup service is unavailable, calls receive UNAVAILABLE.
//
// Calls without the metadata are not guarded. If callers must not receive each other's replies, include the
// authenticated caller in the transaction id with [WithKey], because callers choose their keys.
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
	// KeyMetadata is the metadata with the idempotency key of a call.
	KeyMetadata = "idempotency-key"
	// ReplayedMetadata is "true" in the header metadata of a replayed reply.
	ReplayedMetadata = "idempotency-replayed"
	// Domain is the ErrorInfo domain of a rejected call.
	Domain = "dedup.guard"

	// ReasonDuplicate means that the first call is in progress.
	ReasonDuplicate = "DUPLICATE"
	// ReasonNotKept means that the first call is completed and its reply was not stored.
	ReasonNotKept = "REPLY_NOT_KEPT"
	// ReasonPayloadMismatch means that the key was used for a different request.
	ReasonPayloadMismatch = "PAYLOAD_MISMATCH"
	// ReasonUnavailable means that the dedup service is unavailable.
	ReasonUnavailable = "DEDUP_UNAVAILABLE"

	defaultMaxResultBytes = 4096
)

// Option configures the interceptor.
type Option func(*guard)

// KeyFunc returns the transaction id of a call; build it with dedup.TransactionID. A call with an empty id is not
// guarded. An error is returned to the caller unchanged.
type KeyFunc func(ctx context.Context, fullMethod string, request any) (id string, err error)

// WithKey sets the transaction id of a call. The default consists of the method and the metadata idempotency-key.
func WithKey(key KeyFunc) Option { return func(g *guard) { g.key = key } }

// WithMaxResultBytes sets the size limit of a stored reply. The default is 4,096, as in the service.
func WithMaxResultBytes(n int) Option { return func(g *guard) { g.maxResultBytes = n } }

// ReleaseOnFailure releases the claim if the handler panics or returns an error that is not about the request. A retry
// then runs at once. Use it only if such a failure means that the work had no effect. By default the claim expires.
func ReleaseOnFailure() Option { return func(g *guard) { g.releaseOnFailure = true } }

// WithCallOptions adds options of each claim, such as dedup.TTL, dedup.Wait and dedup.OnUnavailable.
func WithCallOptions(opts ...dedup.CallOption) Option {
	return func(g *guard) { g.callOptions = append(g.callOptions, opts...) }
}

// WithLogger sets the logger for failed completions and releases. The default is slog.Default().
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

// fingerprintOf returns the digest of a request, or nil if it is not a protobuf message.
func fingerprintOf(request any) []byte {
	message, ok := request.(proto.Message)
	if !ok {
		return nil
	}
	// Equal requests must have equal bytes, even if they contain maps.
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		return nil
	}
	sum := sha256.Sum256(encoded)
	return sum[:]
}

// run runs the handler and records its reply or error.
func (g *guard) run(ctx context.Context, request any, handler grpc.UnaryHandler, claim *dedup.Claim) (any, error) {
	// Record the result even if the caller has cancelled.
	after := context.WithoutCancel(ctx)
	ended := false
	defer func() {
		if !ended { // A panic, which continues.
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
		// The work is done. Later calls are rejected as duplicates until the claim expires.
		g.logger.WarnContext(ctx, "dedup: the reply was not recorded", slog.Any("error", completeErr))
	}
	return reply, err
}

// failedItself reports whether an error is not about the request, like a 5xx over HTTP. Such an error is not replayed.
func failedItself(code codes.Code) bool {
	switch code {
	case codes.OK, codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.PermissionDenied,
		codes.Unauthenticated, codes.FailedPrecondition, codes.OutOfRange:
		return false
	default:
		return true
	}
}

// failed releases the claim if ReleaseOnFailure is set.
func (g *guard) failed(ctx context.Context, claim *dedup.Claim) {
	if !g.releaseOnFailure {
		return
	}
	if err := claim.Release(ctx); err != nil {
		g.logger.WarnContext(ctx, "dedup: the claim was not released", slog.Any("error", err))
	}
}

// refuse returns the stored first reply, or the error for a call that must not run.
func (g *guard) refuse(ctx context.Context, err error) (any, error) {
	var duplicate *dedup.DuplicateError
	switch {
	case errors.As(err, &duplicate):
		if duplicate.Transaction.State != dedup.StateCompleted {
			return nil, refusal(codes.Aborted, ReasonDuplicate, "a call with this idempotency key is in progress")
		}
		if reply, replyErr, ok := decode(duplicate.Transaction.Result); ok {
			// SetHeader fails only without a stream, and then nothing reads the header.
			_ = grpc.SetHeader(ctx, metadata.Pairs(ReplayedMetadata, "true"))
			return reply, replyErr
		}
		return nil, refusal(codes.Aborted, ReasonNotKept, "a call with this idempotency key is completed and its reply was not stored")
	case errors.Is(err, dedup.ErrPayloadMismatch):
		return nil, refusal(codes.InvalidArgument, ReasonPayloadMismatch, "the idempotency key was used for a different request")
	case errors.Is(err, context.Canceled):
		return nil, status.FromContextError(context.Canceled).Err()
	case errors.Is(err, dedup.ErrUnavailable):
		return nil, refusal(codes.Unavailable, ReasonUnavailable, "the dedup service is unavailable; the call was not run")
	default:
		return nil, status.Error(codes.Internal, "the idempotency key could not be checked; the call was not run")
	}
}

func refusal(code codes.Code, reason, message string) error {
	s, err := status.New(code, message).WithDetails(&errdetails.ErrorInfo{Domain: Domain, Reason: reason})
	if err != nil {
		return status.Error(code, message)
	}
	return s.Err()
}
