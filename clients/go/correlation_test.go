package dedup_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	dedup "github.com/dedup-service/dedup-service/clients/go"
)

// The README and the doc comments state when the trailing metadata has a correlation id.
func TestCorrelationIDIsReturnedOnlyForLoggedCalls(t *testing.T) {
	var trailer metadata.MD
	client := newClient(t, embeddedServer(t).Target, dedup.WithDialOptions(grpc.WithUnaryInterceptor(
		func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoke(ctx, method, req, reply, conn, append(opts, grpc.Trailer(&trailer))...)
		})))
	returned := func() string { return strings.Join(trailer.Get("x-correlation-id"), ",") }
	ctx := metadata.AppendToOutgoingContext(ctx, "x-correlation-id", "click-4711")

	mustClaimWith(ctx, t, client, newID()) // Connect.
	begun := time.Now()
	mustClaimWith(ctx, t, client, newID())
	// A busy machine may make the call slow, and slow calls are logged.
	if took := time.Since(begun); took < 200*time.Millisecond && returned() != "" {
		t.Errorf("a success after %v has the correlation id %q", took, returned())
	}
	if _, err := client.Claim(ctx, ""); err == nil || returned() != "click-4711" {
		t.Errorf("a failed call has the correlation id %q, want click-4711; %v", returned(), err)
	}
}
