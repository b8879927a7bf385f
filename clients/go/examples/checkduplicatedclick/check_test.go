package checkduplicatedclick_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	dedup "github.com/dedup-service/dedup-service/clients/go"
	"github.com/dedup-service/dedup-service/clients/go/deduptest"
	"github.com/dedup-service/dedup-service/clients/go/examples/checkduplicatedclick"
)

func Example() {
	ctx := context.Background()
	box := checkduplicatedclick.NewLuckyBox(deduptest.NewGuard())
	for range 2 {
		fmt.Println(box.CheckDuplicatedClick(ctx, 431593247, 405, "daily", "2025-11-28"))
	}
	// Output:
	// <nil>
	// multiple click
}

func TestOneOfTenClicksPasses(t *testing.T) {
	ctx := context.Background()
	guard := deduptest.NewGuard()
	box := checkduplicatedclick.NewLuckyBox(guard)
	errs := make([]error, 10)
	var all sync.WaitGroup
	for i := range errs {
		all.Add(1)
		go func() {
			defer all.Done()
			errs[i] = box.CheckDuplicatedClick(ctx, 431593247, 405, "daily", "2025-11-28")
		}()
	}
	all.Wait()
	passed := 0
	for _, err := range errs {
		if err == nil {
			passed++
		} else if !errors.Is(err, checkduplicatedclick.ErrMultipleClick) {
			t.Error(err)
		}
	}
	if passed != 1 {
		t.Errorf("%d clicks passed", passed)
	}
	if _, err := guard.Get(ctx, "lucky_box:431593247:405:daily:2025-11-28"); err != nil {
		t.Error(err)
	}
	if err := box.CheckDuplicatedClick(ctx, 431593247, 405, "daily", "2025-11-29"); err != nil {
		t.Errorf("another day: %v", err)
	}
	guard.Service.Advance(time.Minute)
	if err := box.CheckDuplicatedClick(ctx, 431593247, 405, "daily", "2025-11-28"); err != nil {
		t.Errorf("a minute later: %v", err)
	}
}

func TestNoClickPassesWhileUnavailable(t *testing.T) {
	guard := deduptest.NewGuard(dedup.WithBudget(20 * time.Millisecond))
	guard.Service.SetUnavailable(true)
	err := checkduplicatedclick.NewLuckyBox(guard).CheckDuplicatedClick(context.Background(), 1, 2, "daily", "2025-11-28")
	if !errors.Is(err, dedup.ErrUnavailable) || errors.Is(err, checkduplicatedclick.ErrMultipleClick) {
		t.Error(err)
	}
}
