// Package checkduplicatedclick moves a check for duplicate clicks from a cache to the dedup service. It replaces
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
// Its callers do not change.
package checkduplicatedclick

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	dedup "github.com/dedup-service/dedup-service/clients/go"
)

// ErrMultipleClick reports a click within a minute of the first: answer 409.
var ErrMultipleClick = errors.New("multiple click")

// LuckyBox pays rewards.
type LuckyBox struct {
	guard dedup.Guard
}

// NewLuckyBox returns a lucky box that detects duplicate clicks with guard.
func NewLuckyBox(guard dedup.Guard) *LuckyBox {
	return &LuckyBox{guard: guard}
}

// CheckDuplicatedClick returns nil for the first click of a device on a box within a minute, and ErrMultipleClick for
// later ones. After any other error the click may be a duplicate: pay nothing and answer 503.
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
		return fmt.Errorf("check for a duplicate click: %w", err)
	}
	return nil
}
