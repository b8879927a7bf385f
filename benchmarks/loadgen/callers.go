package main

import (
	"context"
	"fmt"

	"github.com/dedup-service/dedup-service/clients/go/dedupv1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// caller makes one call. bad describes a wrong answer and is empty for a correct one.
type caller func(context.Context) (bad string, err error)

// newCaller returns a caller whose ids begin with its unique prefix.
func newCaller(s settings, connection *grpc.ClientConn, prefix string) (caller, error) {
	stub := dedupv1.NewDedupServiceClient(connection)
	count := 0
	fresh := func() *dedupv1.ClaimTransactionRequest {
		count++
		return &dedupv1.ClaimTransactionRequest{TransactionId: fmt.Sprintf("%s:%d", prefix, count), Claimant: "benchmark"}
	}
	switch s.mode {
	case "noop":
		return func(ctx context.Context) (string, error) {
			return "", connection.Invoke(ctx, "/dedup.benchmark.Noop/Call", fresh(), &emptypb.Empty{})
		}, nil
	case "fresh":
		return func(ctx context.Context) (string, error) {
			request := fresh()
			reply, err := stub.ClaimTransaction(ctx, request)
			if err != nil {
				return "", err
			}
			return notClaimed(request, reply), nil
		}, nil
	case "batch":
		return func(ctx context.Context) (string, error) {
			batch := &dedupv1.BatchClaimTransactionsRequest{}
			for range s.batch {
				batch.Requests = append(batch.Requests, fresh())
			}
			reply, err := stub.BatchClaimTransactions(ctx, batch)
			if err != nil {
				return "", err
			}
			return notAllClaimed(batch, reply), nil
		}, nil
	}
	return nil, fmt.Errorf("mode %q is unknown; use noop, fresh or batch", s.mode)
}

func notClaimed(request *dedupv1.ClaimTransactionRequest, reply *dedupv1.ClaimTransactionResponse) string {
	claimed := reply.GetOutcome() == dedupv1.ClaimOutcome_CLAIM_OUTCOME_CLAIMED
	if !claimed || reply.GetReplayed() || reply.GetTransaction().GetTransactionId() != request.GetTransactionId() {
		return fmt.Sprintf("the first claim of %s received %v", request.GetTransactionId(), reply)
	}
	return ""
}

func notAllClaimed(batch *dedupv1.BatchClaimTransactionsRequest, reply *dedupv1.BatchClaimTransactionsResponse) string {
	if len(reply.GetEntries()) != len(batch.GetRequests()) {
		return fmt.Sprintf("a batch of %d claims received %d answers", len(batch.GetRequests()), len(reply.GetEntries()))
	}
	for i, entry := range reply.GetEntries() {
		if entry.GetResponse() == nil {
			return fmt.Sprintf("the claim of %s failed: %v", batch.GetRequests()[i].GetTransactionId(), entry.GetError())
		}
		if bad := notClaimed(batch.GetRequests()[i], entry.GetResponse()); bad != "" {
			return bad
		}
	}
	return ""
}
