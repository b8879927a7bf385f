// Package checkduplicatedclick moves a check for double clicks from a cache in the process's own hands to the dedup
// service. Before, it was
//
//	ok, err := cache.SetNX(key, true, time.Minute)
//	if err != nil {
//		return err
//	}
//	if !ok {
//		return ErrMultipleClick
//	}
//	return nil
//
// and its callers need not change.
package checkduplicatedclick

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	dedup "github.com/dedup-service/dedup-service/clients/go"
)

// ErrMultipleClick means that this click follows another within a minute: answer 409.
var ErrMultipleClick = errors.New("multiple click")

// LuckyBox pays rewards.
type LuckyBox struct {
	guard dedup.Guard
}

// NewLuckyBox returns a lucky box whose clicks are told apart by guard.
func NewLuckyBox(guard dedup.Guard) *LuckyBox {
	return &LuckyBox{guard: guard}
}

// CheckDuplicatedClick returns nil for the first click of a device on a box within a minute, and ErrMultipleClick for
// those that follow. Any other error means that nobody knows: pay nothing, and answer 503.
func (b *LuckyBox) CheckDuplicatedClick(ctx context.Context, device, unit int64, event, date string) error {
	id, err := dedup.TransactionID("lucky_box", strconv.FormatInt(device, 10), strconv.FormatInt(unit, 10), event, date)
	if err != nil {
		return err
	}
	_, err = b.guard.Claim(ctx, id, dedup.TTL(time.Minute), dedup.Claimant("lucky-box-api"))
	if errors.Is(err, dedup.ErrDuplicate) {
		return ErrMultipleClick
	}
	if err != nil {
		return fmt.Errorf("check for a duplicated click: %w", err)
	}
	return nil
}
