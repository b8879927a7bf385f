// Package grpcguard runs unary gRPC handlers at most once per idempotency key, by the gRPC profile of
// docs/client-contract.md.
//
//	grpc.NewServer(grpc.UnaryInterceptor(grpcguard.UnaryServerInterceptor(client)))
//
// A call with the metadata idempotency-key claims a transaction before its handler runs:
//
//   - The first call runs the handler. Its reply is stored; an error about the request releases the claim, and any other
//     error or a panic keeps it until it expires.
//   - While it is in progress, duplicates receive ABORTED with the reason DUPLICATE in google.rpc.ErrorInfo.
//   - Afterwards, duplicates receive the first reply with the header metadata idempotency-replayed: true, or
//     ALREADY_EXISTS if it is not stored.
//   - The same key with a different request receives FAILED_PRECONDITION.
//   - While the dedup service is unavailable, calls receive UNAVAILABLE.
//
// Calls without the metadata are not guarded. The claim is kept alive while the handler runs. If it is lost, the
// handler's context ends and context.Cause returns dedup.ErrClaimLost. dedup.FromContext returns the claim, such as to see
// FailOpen; a claim the handler completes or releases is left alone.
package grpcguard

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/internal/identity"
)

const (
	// KeyMetadata is the metadata with the idempotency key of a call.
	KeyMetadata = "idempotency-key"
	// ReplayedMetadata is "true" in the header metadata of a replayed reply.
	ReplayedMetadata = "idempotency-replayed"
	// Domain is the ErrorInfo domain of a rejected call.
	Domain = "dedup.guard"

	// ReasonDuplicate means that the first call is in progress, or that its effect is unknown.
	ReasonDuplicate = "DUPLICATE"
	// ReasonNotKept means that the first call is completed and its reply was not stored.
	ReasonNotKept = "REPLY_NOT_KEPT"
	// ReasonPayloadMismatch means that the key was used for a different request.
	ReasonPayloadMismatch = "PAYLOAD_MISMATCH"
	// ReasonUnavailable means that the dedup service is unavailable.
	ReasonUnavailable = "DEDUP_UNAVAILABLE"
	// ReasonKeyInvalid means that the key is invalid.
	ReasonKeyInvalid = "KEY_INVALID"

	defaultMaxResultBytes = 4096
)

// Option configures the interceptor.
type Option func(*guard)

// KeyFunc returns the transaction id of a call; build it with dedup.TransactionID. A call with an empty id is not
// guarded. An error is returned to the caller unchanged.
type KeyFunc func(ctx context.Context, fullMethod string, request any) (id string, err error)

// WithKey sets the transaction id of a call. The default consists of the caller, the method and the metadata
// idempotency-key.
func WithKey(key KeyFunc) Option { return func(g *guard) { g.key = key } }

// WithCaller adds the authenticated caller to the transaction id. Set it if callers must not receive each other's
// replies, because callers choose their keys.
func WithCaller(caller func(ctx context.Context) string) Option {
	return func(g *guard) { g.caller = caller }
}

// WithMaxResultBytes sets the size limit of a stored reply. The default is 4,096, as in the service.
func WithMaxResultBytes(n int) Option { return func(g *guard) { g.maxResultBytes = n } }

// WithRetention sets how long a reply is stored. The default is the namespace's.
func WithRetention(d time.Duration) Option { return func(g *guard) { g.retention = d } }

// WithOutcome sets what happens to the claim by the code of the handler's error. The default is [OutcomeOf].
func WithOutcome(outcome func(codes.Code) dedup.Outcome) Option {
	return func(g *guard) { g.outcome = outcome }
}

// OutcomeOf completes OK, releases the codes that are about the request or mean that nothing was done, and keeps the
// claim for all others.
func OutcomeOf(code codes.Code) dedup.Outcome {
	switch code {
	case codes.OK:
		return dedup.Complete
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.PermissionDenied, codes.Unauthenticated,
		codes.FailedPrecondition, codes.OutOfRange, codes.Aborted, codes.ResourceExhausted, codes.Unimplemented:
		return dedup.Release
	default:
		return dedup.Keep
	}
}

// WithMaxHold limits how long the claim is kept alive. The default is 1 hour.
func WithMaxHold(d time.Duration) Option { return func(g *guard) { g.maxHold = dedup.MaxHold(d) } }

// WithoutKeepAlive lets the claim expire at the end of its ttl, even if the handler is running.
func WithoutKeepAlive() Option { return func(g *guard) { g.noKeepAlive = true } }

// WithCallOptions adds options of each claim, such as dedup.TTL, dedup.Wait and dedup.OnUnavailable.
func WithCallOptions(opts ...dedup.CallOption) Option {
	return func(g *guard) { g.callOptions = append(g.callOptions, opts...) }
}

// WithLogger sets the logger for failed claims, completions and releases. The default is slog.Default().
func WithLogger(l *slog.Logger) Option { return func(g *guard) { g.logger = l } }

type guard struct {
	dedup          dedup.Guard
	key            KeyFunc
	caller         func(context.Context) string
	maxResultBytes int
	retention      time.Duration // 0: the namespace's
	outcome        func(codes.Code) dedup.Outcome
	maxHold        dedup.KeepAliveOption
	noKeepAlive    bool
	callOptions    []dedup.CallOption
	logger         *slog.Logger
}

// UnaryServerInterceptor returns an interceptor that guards the unary calls of a server.
func UnaryServerInterceptor(client dedup.Guard, opts ...Option) grpc.UnaryServerInterceptor {
	g := &guard{
		dedup: client, caller: func(context.Context) string { return "" }, maxResultBytes: defaultMaxResultBytes,
		outcome: OutcomeOf, maxHold: dedup.MaxHold(time.Hour), logger: slog.Default(),
	}
	g.key = g.keyOfMetadata
	for _, opt := range opts {
		opt(g)
	}
	return g.intercept
}

func (g *guard) keyOfMetadata(ctx context.Context, fullMethod string, _ any) (string, error) {
	values := metadata.ValueFromIncomingContext(ctx, KeyMetadata)
	if len(values) == 0 {
		return "", nil
	}
	key, err := identity.Key(values)
	if err == nil {
		var id string
		if id, err = dedup.TransactionID("grpc", g.caller(ctx), fullMethod, key); err == nil {
			return id, nil
		}
	}
	return "", refusal(codes.InvalidArgument, ReasonKeyInvalid, err.Error())
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
	if fingerprint := fingerprintOf(info.FullMethod, request); fingerprint != nil {
		options = append([]dedup.CallOption{dedup.Fingerprint(fingerprint)}, options...)
	}
	claim, err := g.dedup.Claim(ctx, id, options...)
	if err != nil {
		return g.refuse(ctx, info.FullMethod, err)
	}
	return g.run(ctx, request, handler, claim)
}

// fingerprintOf returns the digest of a call, or nil if its request is not a protobuf message.
func fingerprintOf(fullMethod string, request any) []byte {
	message, ok := request.(proto.Message)
	if !ok {
		return nil
	}
	// Equal requests must have equal bytes, even if they contain maps.
	encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(message)
	if err != nil {
		return nil
	}
	return identity.Fingerprint([]byte(fullMethod), encoded)
}

// run runs the handler and records its reply. A panic continues and keeps the claim.
func (g *guard) run(ctx context.Context, request any, handler grpc.UnaryHandler, claim *dedup.Claim) (any, error) {
	work := dedup.NewContext(ctx, claim)
	if !g.noKeepAlive {
		var stop context.CancelFunc
		work, stop = claim.KeepAlive(work, g.maxHold)
		defer stop()
	}
	reply, err := handler(work, request)
	if claim.Ended() { // By the handler.
		return reply, err
	}
	var endErr error
	switch g.outcome(status.Code(err)) {
	case dedup.Complete:
		var opts []dedup.CompleteOption
		if g.retention > 0 {
			opts = append(opts, dedup.RetainFor(g.retention))
		}
		endErr = claim.Complete(ctx, encode(reply, err, g.maxResultBytes), opts...)
	case dedup.Release:
		endErr = claim.Release(ctx)
	}
	if endErr != nil {
		// Later calls are rejected as duplicates until the claim expires.
		g.logger.WarnContext(ctx, "dedup: the outcome of the call was not recorded", slog.Any("error", endErr))
	}
	return reply, err
}

// refuse returns the stored first reply, or the error for a call that must not run.
func (g *guard) refuse(ctx context.Context, fullMethod string, err error) (any, error) {
	var duplicate *dedup.DuplicateError
	var failure *dedup.Error
	switch {
	case errors.As(err, &duplicate):
		if duplicate.Transaction.State != dedup.StateCompleted {
			return nil, refusal(codes.Aborted, ReasonDuplicate, "a call with this idempotency key is in progress, or its effect is unknown")
		}
		if reply := decode(duplicate.Transaction.Result, replyType(fullMethod)); reply != nil {
			// SetHeader fails only without a stream, and then nothing reads the header.
			_ = grpc.SetHeader(ctx, metadata.Pairs(ReplayedMetadata, "true"))
			return reply, nil
		}
		return nil, refusal(codes.AlreadyExists, ReasonNotKept, "a call with this idempotency key is completed and its reply was not stored")
	case errors.Is(err, dedup.ErrPayloadMismatch):
		return nil, refusal(codes.FailedPrecondition, ReasonPayloadMismatch, "the idempotency key was used for a different request")
	case errors.As(err, &failure) && len(failure.Violations) > 0 && failure.Violations[0].Field == "transaction_id":
		return nil, refusal(codes.InvalidArgument, ReasonKeyInvalid, "the idempotency key is invalid")
	default:
		g.logger.WarnContext(ctx, "dedup: the call was not checked and not run", slog.Any("error", err))
		return nil, refusal(codes.Unavailable, ReasonUnavailable, "the dedup service is unavailable; the call was not run")
	}
}

func refusal(code codes.Code, reason, message string) error {
	s, err := status.New(code, message).WithDetails(&errdetails.ErrorInfo{Domain: Domain, Reason: reason})
	if err != nil {
		return status.Error(code, message)
	}
	return s.Err()
}
