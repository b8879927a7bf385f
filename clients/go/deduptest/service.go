package deduptest

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

const (
	defaultTTL       = time.Minute
	defaultRetention = 24 * time.Hour
	maxTTL           = 7 * 24 * time.Hour
	maxWait          = 5 * time.Minute
	maxResultBytes   = 4096
	maxBatch         = 1000

	// waitInterval is how often a waiting claim checks the test's clock.
	waitInterval = 2 * time.Millisecond
)

// Service is an in-memory dedup service with the defaults of the real one. It is safe for concurrent use and can be
// registered with a gRPC server.
type Service struct {
	dedupv1.UnimplementedDedupServiceServer

	mu      sync.Mutex
	now     func() time.Time
	offset  time.Duration
	down    bool
	records map[key]*record
	// policies has the rules of namespaces; of others, the defaults.
	policies    map[string]Policy
	onlyKnown   bool
	resultBytes int
}

// Policy has the rules of a namespace, as in the policy file of the service. The service's default replaces a field
// that is 0.
type Policy struct {
	// DefaultTTL is the lifetime of a claim that requests none, MaxTTL the longest that a caller may request.
	DefaultTTL, MaxTTL time.Duration
	// Retention is how long a completed transaction is kept.
	Retention time.Duration
	// Shadow grants duplicates and marks them.
	Shadow bool
}

type key struct{ namespace, id string }

type record struct {
	token       string
	fingerprint []byte
	shown       *dedupv1.Transaction // replaced on change, never modified
	expires     time.Time
}

// NewService returns a service without claims that uses the system clock.
func NewService() *Service {
	return &Service{now: time.Now, records: map[key]*record{}, policies: map[string]Policy{}, resultBytes: maxResultBytes}
}

// SetClock replaces the clock and undoes earlier calls of Advance.
func (s *Service) SetClock(now func() time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now, s.offset = now, 0
}

// Advance moves the clock forward, so claims expire without waiting.
func (s *Service) Advance(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.offset += d
}

// SetPolicy sets the rules of a namespace. It panics if a lifetime is negative or exceeds MaxTTL, because the service
// does not start with such a policy.
func (s *Service) SetPolicy(namespace string, p Policy) {
	p = p.complete()
	for name, d := range map[string]time.Duration{"DefaultTTL": p.DefaultTTL, "MaxTTL": p.MaxTTL, "Retention": p.Retention} {
		if d < 0 || d > p.MaxTTL {
			panic(fmt.Sprintf("deduptest: %s is %v; it must be positive and at most MaxTTL, %v", name, d, p.MaxTTL))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.policies[namespace] = p
}

// SetAllowUnknownNamespaces(false) rejects namespaces without a policy, until SetAllowUnknownNamespaces(true).
func (s *Service) SetAllowUnknownNamespaces(allow bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onlyKnown = !allow
}

// SetMaxResultBytes limits the results of completions. The default is 4,096.
func (s *Service) SetMaxResultBytes(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resultBytes = n
}

// complete returns the policy with the defaults of the service.
func (p Policy) complete() Policy {
	longest := cmp.Or(p.MaxTTL, maxTTL)
	return Policy{cmp.Or(p.DefaultTTL, defaultTTL), longest, cmp.Or(p.Retention, min(defaultRetention, longest)), p.Shadow}
}

// policy returns the rules for a request; the lock is held.
func (s *Service) policy(r named) (Policy, error) {
	p, known := s.policies[namespaceOf(r)]
	if !known && s.onlyKnown {
		return p, errInvalid("namespace", "is not known here: set its policy")
	}
	return p.complete(), nil
}

// SetUnavailable(true) makes every call fail with UNAVAILABLE and applied "no", until SetUnavailable(false).
func (s *Service) SetUnavailable(down bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = down
}

// ClaimTransaction implements [dedupv1.DedupServiceServer].
func (s *Service) ClaimTransaction(ctx context.Context, r *dedupv1.ClaimTransactionRequest) (*dedupv1.ClaimTransactionResponse, error) {
	if err := checkClaim(r); err != nil {
		return nil, err
	}
	wait := r.GetWait().AsDuration()
	var end time.Time
	for {
		reply, now, err := s.claim(r)
		if end.IsZero() {
			end = now.Add(wait)
		}
		inProgress := reply.GetOutcome() == dedupv1.ClaimOutcome_CLAIM_OUTCOME_DUPLICATE &&
			reply.GetTransaction().GetState() == dedupv1.TransactionState_TRANSACTION_STATE_IN_PROGRESS
		if err != nil || !inProgress || !now.Before(end) {
			return reply, err
		}
		select {
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		case <-time.After(waitInterval):
		}
	}
}

func (s *Service) claim(r *dedupv1.ClaimTransactionRequest) (*dedupv1.ClaimTransactionResponse, time.Time, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.time()
	if s.down {
		return nil, now, errUnavailable()
	}
	var at *timestamppb.Timestamp
	if _, ok := r.GetExpiry().(*dedupv1.ClaimTransactionRequest_ExpireTime); ok {
		at = r.GetExpireTime()
	}
	policy, err := s.policy(r)
	if err != nil {
		return nil, now, err
	}
	expires, err := expiry(now, r.GetTtl(), at, policy.DefaultTTL, policy.MaxTTL)
	if err != nil {
		return nil, now, err
	}
	k := key{namespaceOf(r), r.GetTransactionId()}
	held := s.held(k)
	token := r.GetClaimToken()
	if held == nil {
		if token == "" {
			token = newToken()
		}
		held = &record{
			token: token, fingerprint: bytes.Clone(r.GetPayloadFingerprint()), expires: expires,
			shown: &dedupv1.Transaction{
				TransactionId: k.id, Namespace: k.namespace, Claimant: r.GetClaimant(),
				State:     dedupv1.TransactionState_TRANSACTION_STATE_IN_PROGRESS,
				ClaimTime: timestamppb.New(now), ExpireTime: timestamppb.New(expires),
			},
		}
		s.records[k] = held
		return claimed(held, false), now, nil
	}
	inProgress := held.shown.GetState() == dedupv1.TransactionState_TRANSACTION_STATE_IN_PROGRESS
	outcome := dedupv1.ClaimOutcome_CLAIM_OUTCOME_DUPLICATE
	switch {
	case mismatch(held.fingerprint, r.GetPayloadFingerprint()):
		outcome = dedupv1.ClaimOutcome_CLAIM_OUTCOME_PAYLOAD_MISMATCH
	case token != "" && token == held.token && inProgress:
		return claimed(held, true), now, nil
	}
	if policy.Shadow {
		return &dedupv1.ClaimTransactionResponse{
			Outcome:    dedupv1.ClaimOutcome_CLAIM_OUTCOME_CLAIMED,
			ClaimToken: token, ShadowDuplicate: true, Transaction: held.shown,
		}, now, nil
	}
	return &dedupv1.ClaimTransactionResponse{Outcome: outcome, Transaction: held.shown}, now, nil
}

func claimed(r *record, replayed bool) *dedupv1.ClaimTransactionResponse {
	return &dedupv1.ClaimTransactionResponse{
		Outcome:    dedupv1.ClaimOutcome_CLAIM_OUTCOME_CLAIMED,
		ClaimToken: r.token, Replayed: replayed, Transaction: r.shown,
	}
}

// CompleteTransaction implements [dedupv1.DedupServiceServer].
func (s *Service) CompleteTransaction(_ context.Context, r *dedupv1.CompleteTransactionRequest) (*dedupv1.CompleteTransactionResponse, error) {
	if err := checkHolder(r); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(r.GetResult()) > s.resultBytes {
		return nil, errInvalid("result", fmt.Sprintf("must be at most %d bytes", s.resultBytes))
	}
	if s.down {
		return nil, errUnavailable()
	}
	now := s.time()
	var at *timestamppb.Timestamp
	if _, ok := r.GetRetention().(*dedupv1.CompleteTransactionRequest_ExpireTime); ok {
		at = r.GetExpireTime()
	}
	policy, err := s.policy(r)
	if err != nil {
		return nil, err
	}
	expires, err := expiry(now, r.GetTtl(), at, policy.Retention, policy.MaxTTL)
	if err != nil {
		return nil, err
	}
	held := s.heldBy(r)
	if held == nil {
		return &dedupv1.CompleteTransactionResponse{Outcome: dedupv1.CompleteOutcome_COMPLETE_OUTCOME_NOT_HELD}, nil
	}
	if held.shown.GetState() == dedupv1.TransactionState_TRANSACTION_STATE_COMPLETED {
		if !bytes.Equal(held.shown.GetResult(), r.GetResult()) {
			return &dedupv1.CompleteTransactionResponse{Outcome: dedupv1.CompleteOutcome_COMPLETE_OUTCOME_NOT_HELD}, nil
		}
	} else {
		held.expires = expires
		held.shown = with(held.shown, func(t *dedupv1.Transaction) {
			t.State = dedupv1.TransactionState_TRANSACTION_STATE_COMPLETED
			t.CompletionTime = timestamppb.New(now)
			t.ExpireTime = timestamppb.New(expires)
			t.Result = bytes.Clone(r.GetResult())
		})
	}
	return &dedupv1.CompleteTransactionResponse{
		Outcome: dedupv1.CompleteOutcome_COMPLETE_OUTCOME_COMPLETED, Transaction: held.shown,
	}, nil
}

// ReleaseTransaction implements [dedupv1.DedupServiceServer].
func (s *Service) ReleaseTransaction(_ context.Context, r *dedupv1.ReleaseTransactionRequest) (*dedupv1.ReleaseTransactionResponse, error) {
	if err := checkHolder(r); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return nil, errUnavailable()
	}
	if _, err := s.policy(r); err != nil {
		return nil, err
	}
	if s.inProgressBy(r) == nil {
		return &dedupv1.ReleaseTransactionResponse{Outcome: dedupv1.ReleaseOutcome_RELEASE_OUTCOME_NOT_HELD}, nil
	}
	delete(s.records, key{namespaceOf(r), r.GetTransactionId()})
	return &dedupv1.ReleaseTransactionResponse{Outcome: dedupv1.ReleaseOutcome_RELEASE_OUTCOME_RELEASED}, nil
}

// ExtendTransaction implements [dedupv1.DedupServiceServer].
func (s *Service) ExtendTransaction(_ context.Context, r *dedupv1.ExtendTransactionRequest) (*dedupv1.ExtendTransactionResponse, error) {
	if err := checkHolder(r); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return nil, errUnavailable()
	}
	var at *timestamppb.Timestamp
	if _, ok := r.GetExpiry().(*dedupv1.ExtendTransactionRequest_ExpireTime); ok {
		at = r.GetExpireTime()
	}
	policy, err := s.policy(r)
	if err != nil {
		return nil, err
	}
	expires, err := expiry(s.time(), r.GetTtl(), at, policy.DefaultTTL, policy.MaxTTL)
	if err != nil {
		return nil, err
	}
	held := s.inProgressBy(r)
	if held == nil {
		return &dedupv1.ExtendTransactionResponse{Outcome: dedupv1.ExtendOutcome_EXTEND_OUTCOME_NOT_HELD}, nil
	}
	if expires.After(held.expires) || r.GetAllowShortening() {
		held.expires = expires
		held.shown = with(held.shown, func(t *dedupv1.Transaction) { t.ExpireTime = timestamppb.New(expires) })
	}
	return &dedupv1.ExtendTransactionResponse{
		Outcome: dedupv1.ExtendOutcome_EXTEND_OUTCOME_EXTENDED, Transaction: held.shown,
	}, nil
}

// GetTransaction implements [dedupv1.DedupServiceServer].
func (s *Service) GetTransaction(_ context.Context, r *dedupv1.GetTransactionRequest) (*dedupv1.GetTransactionResponse, error) {
	if err := checkName(r); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return nil, errUnavailable()
	}
	if _, err := s.policy(r); err != nil {
		return nil, err
	}
	held := s.held(key{namespaceOf(r), r.GetTransactionId()})
	if held == nil {
		return nil, errNotFound()
	}
	return &dedupv1.GetTransactionResponse{Transaction: held.shown}, nil
}

// BatchClaimTransactions implements [dedupv1.DedupServiceServer].
func (s *Service) BatchClaimTransactions(ctx context.Context, r *dedupv1.BatchClaimTransactionsRequest) (*dedupv1.BatchClaimTransactionsResponse, error) {
	if n := len(r.GetRequests()); n < 1 || n > maxBatch {
		return nil, errInvalid("requests", "must have 1 to 1,000 entries")
	}
	reply := &dedupv1.BatchClaimTransactionsResponse{}
	for _, request := range r.GetRequests() {
		entry := &dedupv1.BatchClaimEntry{}
		var claim *dedupv1.ClaimTransactionResponse
		err := errInvalid("wait", "is not allowed in a batch")
		if request.GetWait() == nil {
			claim, err = s.ClaimTransaction(ctx, request)
		}
		if err != nil {
			entry.Result = &dedupv1.BatchClaimEntry_Error{Error: status.Convert(err).Proto()}
		} else {
			entry.Result = &dedupv1.BatchClaimEntry_Response{Response: claim}
		}
		reply.Entries = append(reply.Entries, entry)
	}
	return reply, nil
}

// time returns the service's current time; the lock is held.
func (s *Service) time() time.Time {
	return s.now().Add(s.offset).Truncate(time.Millisecond)
}

// held returns the live record of a transaction and deletes an expired one; the lock is held.
func (s *Service) held(k key) *record {
	r := s.records[k]
	if r != nil && !s.time().Before(r.expires) {
		delete(s.records, k)
		return nil
	}
	return r
}

// heldBy returns the record if the request's token holds or completed it; the lock is held.
func (s *Service) heldBy(r holder) *record {
	held := s.held(key{namespaceOf(r), r.GetTransactionId()})
	if held == nil || held.token != r.GetClaimToken() {
		return nil
	}
	return held
}

// inProgressBy returns the record if the request's token holds it and it is in progress; the lock is held.
func (s *Service) inProgressBy(r holder) *record {
	held := s.heldBy(r)
	if held == nil || held.shown.GetState() != dedupv1.TransactionState_TRANSACTION_STATE_IN_PROGRESS {
		return nil
	}
	return held
}

// mismatch reports whether both fingerprints are set and differ.
func mismatch(a, b []byte) bool {
	return len(a) > 0 && len(b) > 0 && !bytes.Equal(a, b)
}
