// Shared with every client; a test compares them with clients/golden/keep_alive.json.
const LONGEST_JITTER = 0.1;
const SHORTEST_REPEAT_MS = 50;
/** The default of `maxHoldMs`. */
export const MAX_HOLD_MS = 3_600_000;

const LONGEST_TIMER_MS = 2 ** 31 - 1;

/** Replaced in tests. */
export interface Timers {
  /** Monotonic milliseconds. */
  now(): number;
  /** At least 0 and less than 1. */
  random(): number;
  /** Call `run` later; returns a function that cancels it. */
  after(ms: number, run: () => void): () => void;
}

export const systemTimers: Timers = {
  now: () => performance.now(),
  random: Math.random,
  after: (ms, run) => {
    // Work that has ended must not keep the process alive.
    const timer = setTimeout(run, ms).unref();
    return () => clearTimeout(timer);
  },
};

/** How long after an extension was sent the next one is; `jitter` is from 0 to 1. */
export function extensionMs(leaseMs: number, jitter: number): number {
  return (leaseMs / 3) * (1 - LONGEST_JITTER * jitter);
}

/** How long after an unanswered or failed extension the next one is. */
export function repeatMs(leaseMs: number): number {
  return Math.max(leaseMs / 10, SHORTEST_REPEAT_MS);
}

/** How long before the end of its lease a claim counts as lost. */
export function marginMs(leaseMs: number): number {
  return leaseMs / 10;
}

/** The part of a claim that keep-alive uses. */
export interface Holding {
  leaseMs: number;
  /** When the claim was sent. */
  sentAt: number;
  maxHoldMs: number;
  /** The lease may have begun earlier, so it is extended at once. */
  replayed: boolean;
  /** Send one extension; returns false if the claim is not held. */
  extend(ttlMs: number, limitMs: number): Promise<boolean>;
  /** Called once, unless the lease was ended before. */
  lost(): void;
}

/** Extends the claims of a client while their work runs, with one timer. */
export class KeepAlive {
  readonly #timers: Timers;
  readonly #leases = new Set<Lease>();
  #wakesAt = Infinity;
  #cancel: () => void = () => undefined;

  constructor(timers: Timers) {
    this.#timers = timers;
  }

  /** Extend a claim until its lease is ended or lost. */
  hold(holding: Holding): Lease {
    const lease = new Lease(holding, this.#timers, (lease) => this.#changed(lease));
    this.#leases.add(lease);
    this.#wakeAt(lease.dueAt);
    return lease;
  }

  /** End every lease, without a loss. */
  close(): void {
    for (const lease of this.#leases) lease.end();
  }

  #changed(lease: Lease): void {
    if (lease.active) this.#wakeAt(lease.dueAt);
    else this.#leases.delete(lease);
    if (this.#leases.size > 0) return;
    this.#cancel();
    this.#wakesAt = Infinity;
  }

  #wakeAt(at: number): void {
    if (at >= this.#wakesAt) return;
    this.#cancel();
    this.#wakesAt = at;
    const waitMs = Math.min(Math.max(0, at - this.#timers.now()), LONGEST_TIMER_MS);
    this.#cancel = this.#timers.after(waitMs, () => this.#wake());
  }

  #wake(): void {
    this.#wakesAt = Infinity;
    const now = this.#timers.now();
    let next = Infinity;
    for (const lease of this.#leases) {
      lease.act(now);
      if (lease.active) next = Math.min(next, lease.dueAt);
    }
    this.#wakeAt(next);
  }
}

/** The lease of one claim. All times are by the monotonic clock of the caller. */
export class Lease {
  active = true;
  readonly #holding: Holding;
  readonly #timers: Timers;
  readonly #changed: (lease: Lease) => void;
  readonly #holdUntil: number;
  #endsAt: number;
  #lostAt: number;
  #nextAt: number;

  constructor(holding: Holding, timers: Timers, changed: (lease: Lease) => void) {
    this.#holding = holding;
    this.#timers = timers;
    this.#changed = changed;
    const { leaseMs, sentAt, maxHoldMs, replayed } = holding;
    this.#holdUntil = sentAt + maxHoldMs;
    this.#endsAt = sentAt + leaseMs;
    this.#lostAt = this.#endsAt - marginMs(leaseMs);
    this.#nextAt = replayed ? sentAt : sentAt + extensionMs(leaseMs, timers.random());
  }

  /** When `act` has something to do. */
  get dueAt(): number {
    return Math.min(this.#nextAt, this.#lostAt);
  }

  /** Extend the claim or report its loss, if it is time. */
  act(now: number): void {
    if (now >= this.#lostAt) this.lose();
    else if (now >= this.#nextAt) this.#extend(now);
  }

  /** Record a lease that was granted by a call sent at `sentAt`. */
  renew(sentAt: number, ttlMs: number): void {
    // A late answer to an earlier extension must not shorten the lease.
    if (!this.active || sentAt + ttlMs < this.#endsAt) return;
    this.#endsAt = sentAt + ttlMs;
    this.#lostAt = this.#endsAt - marginMs(ttlMs);
    this.#nextAt = sentAt + extensionMs(Math.min(ttlMs, this.#holding.leaseMs), this.#timers.random());
    this.#changed(this);
  }

  /** Report the loss. */
  lose(): void {
    if (!this.active) return;
    this.end();
    this.#holding.lost();
  }

  /** Stop extending. */
  end(): void {
    this.active = false;
    this.#changed(this);
  }

  #extend(now: number): void {
    const { leaseMs, extend } = this.#holding;
    const ttlMs = Math.floor(Math.min(leaseMs, this.#holdUntil - now));
    if (ttlMs < leaseMs && now + ttlMs < this.#endsAt + 1) {
      // The longest hold is reached.
      this.#nextAt = Infinity;
      return;
    }
    this.#nextAt = now + repeatMs(leaseMs);
    extend(ttlMs, this.#endsAt - now).then(
      (held) => (held ? this.renew(now, ttlMs) : this.lose()),
      // It is repeated until the lease ends.
      () => undefined,
    );
  }
}
