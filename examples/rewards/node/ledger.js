// The rewards that were paid: in memory, or in the table `rewards` of a PostgreSQL.

// No unique constraint, so that a reward paid twice is visible. A real table has one on the key. Concurrent CREATE TABLE
// IF NOT EXISTS can fail in PostgreSQL, hence the lock; its number is arbitrary.
const TABLE = `
  BEGIN;
  SELECT pg_advisory_xact_lock(7382);
  CREATE TABLE IF NOT EXISTS rewards (id bigserial, idempotency_key text, unit text, amount int, paid_by text);
  COMMIT`;
const INSERT = "INSERT INTO rewards (idempotency_key, unit, amount, paid_by) VALUES ($1, $2, $3, $4) RETURNING id";
const SELECT = "SELECT id::int, idempotency_key, unit, amount, paid_by FROM rewards ORDER BY id";

/** Return the ledger in the PostgreSQL of `url`, or without one a ledger in memory. */
export async function openLedger(url) {
  if (!url) return new MemoryLedger();
  // Imported here: the ledger in memory needs no PostgreSQL driver.
  const { default: pg } = await import("pg");
  const pool = new pg.Pool({ connectionString: url });
  // A connection that breaks while idle is replaced.
  pool.on("error", (error) => console.error(error.message));
  await pool.query(TABLE);
  return new PostgresLedger(pool);
}

/** Forgets the rewards at the end of the process. */
class MemoryLedger {
  #paid = [];

  /** Pay a reward, and return its number. This is the effect that must not happen twice. */
  async pay({ key, unit, amount, paidBy }) {
    const id = this.#paid.length + 1;
    this.#paid.push({ id, idempotency_key: key, unit, amount, paid_by: paidBy });
    return id;
  }

  /** Return the rewards in the order of payment. */
  async paid() {
    return this.#paid;
  }

  async close() {}
}

/** Pays a reward by one INSERT, which commits at once. */
class PostgresLedger {
  #pool;

  constructor(pool) {
    this.#pool = pool;
  }

  async pay({ key, unit, amount, paidBy }) {
    const { rows } = await this.#pool.query(INSERT, [key, unit, amount, paidBy]);
    return Number(rows[0].id);
  }

  async paid() {
    const { rows } = await this.#pool.query(SELECT);
    return rows;
  }

  async close() {
    await this.#pool.end();
  }
}
