package main

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	// No unique constraint, so that a reward paid twice is visible. A real table has one on the key. Concurrent CREATE
	// TABLE IF NOT EXISTS can fail in PostgreSQL, hence the lock; its number is arbitrary.
	createTable = `
		BEGIN;
		SELECT pg_advisory_xact_lock(7382);
		CREATE TABLE IF NOT EXISTS rewards (id bigserial, idempotency_key text, unit text, amount int, paid_by text);
		COMMIT`
	insertReward = `INSERT INTO rewards (idempotency_key, unit, amount, paid_by) VALUES ($1, $2, $3, $4) RETURNING id`
	selectReward = `SELECT id, idempotency_key, unit, amount, paid_by FROM rewards ORDER BY id`
)

// reward is a paid reward.
type reward struct {
	ID     int64  `json:"id"`
	Key    string `json:"idempotency_key"`
	Unit   string `json:"unit"`
	Amount int    `json:"amount"`
	PaidBy string `json:"paid_by"`
}

// ledger pays rewards and lists them.
type ledger interface {
	// pay pays a reward, and returns its number. This is the effect that must not happen twice.
	pay(ctx context.Context, r reward) (int64, error)
	// paid returns the rewards in the order of payment.
	paid(ctx context.Context) ([]reward, error)
	close()
}

// openLedger returns the ledger in a PostgreSQL, or without a URL one in memory.
func openLedger(ctx context.Context, url string) (ledger, error) {
	if url == "" {
		return &memoryLedger{rewards: []reward{}}, nil
	}
	pool, err := pgxpool.New(ctx, url)
	if err != nil {
		return nil, err
	}
	if _, err := pool.Exec(ctx, createTable); err != nil {
		pool.Close()
		return nil, err
	}
	return postgresLedger{pool}, nil
}

// memoryLedger forgets the rewards at the end of the process.
type memoryLedger struct {
	mutex   sync.Mutex
	rewards []reward
}

func (l *memoryLedger) pay(ctx context.Context, r reward) (int64, error) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if ctx.Err() != nil {
		return 0, errors.Join(errors.New("not paid"), context.Cause(ctx))
	}
	r.ID = int64(len(l.rewards)) + 1
	l.rewards = append(l.rewards, r)
	return r.ID, nil
}

func (l *memoryLedger) paid(context.Context) ([]reward, error) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return slices.Clone(l.rewards), nil
}

func (l *memoryLedger) close() {}

// postgresLedger pays a reward by one INSERT, which commits at once.
type postgresLedger struct{ pool *pgxpool.Pool }

func (l postgresLedger) pay(ctx context.Context, r reward) (number int64, err error) {
	err = l.pool.QueryRow(ctx, insertReward, r.Key, r.Unit, r.Amount, r.PaidBy).Scan(&number)
	return number, err
}

func (l postgresLedger) paid(ctx context.Context) ([]reward, error) {
	rows, err := l.pool.Query(ctx, selectReward)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[reward])
}

func (l postgresLedger) close() { l.pool.Close() }
