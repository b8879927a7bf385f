// Package deduptest has an in-memory dedup service for tests of code that claims transactions.
//
//	guard := deduptest.NewGuard()
//	claim, err := guard.Claim(ctx, "order-1234")
//
// The guard is a real [dedup.Client] over an in-memory [Service] that keeps the contract. The test controls the clock
// by which claims expire.
package deduptest

import (
	"context"

	"google.golang.org/grpc"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
)

// Guard is a [dedup.Guard] that needs no server.
type Guard struct {
	*dedup.Client
	// Service holds the claims, the clock and the availability.
	Service *Service
}

var _ dedup.Guard = (*Guard)(nil)

// NewGuard returns a guard with its own service. It panics if an option is invalid.
func NewGuard(opts ...dedup.Option) *Guard {
	service := NewService()
	client, err := dedup.NewFromStub(stub{service}, opts...)
	if err != nil {
		panic(err)
	}
	return &Guard{Client: client, Service: service}
}

// stub calls the service without a connection.
type stub struct{ service *Service }

func (s stub) ClaimTransaction(ctx context.Context, r *dedupv1.ClaimTransactionRequest, _ ...grpc.CallOption) (*dedupv1.ClaimTransactionResponse, error) {
	return s.service.ClaimTransaction(ctx, r)
}

func (s stub) CompleteTransaction(ctx context.Context, r *dedupv1.CompleteTransactionRequest, _ ...grpc.CallOption) (*dedupv1.CompleteTransactionResponse, error) {
	return s.service.CompleteTransaction(ctx, r)
}

func (s stub) ReleaseTransaction(ctx context.Context, r *dedupv1.ReleaseTransactionRequest, _ ...grpc.CallOption) (*dedupv1.ReleaseTransactionResponse, error) {
	return s.service.ReleaseTransaction(ctx, r)
}

func (s stub) ExtendTransaction(ctx context.Context, r *dedupv1.ExtendTransactionRequest, _ ...grpc.CallOption) (*dedupv1.ExtendTransactionResponse, error) {
	return s.service.ExtendTransaction(ctx, r)
}

func (s stub) GetTransaction(ctx context.Context, r *dedupv1.GetTransactionRequest, _ ...grpc.CallOption) (*dedupv1.GetTransactionResponse, error) {
	return s.service.GetTransaction(ctx, r)
}

func (s stub) BatchClaimTransactions(ctx context.Context, r *dedupv1.BatchClaimTransactionsRequest, _ ...grpc.CallOption) (*dedupv1.BatchClaimTransactionsResponse, error) {
	return s.service.BatchClaimTransactions(ctx, r)
}
