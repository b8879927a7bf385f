// Decides which claims travel together, by docs/client-contract.md#coalescing. It knows no timers.

/** The number of claims in flight from which further claims wait for each other. */
export const CROWD = 4;
/** The service works on as many claims at a time. */
export const MAX_BATCH = 100;
/** The longest wait of a claim. */
export const MAX_DELAY_MS = 1;
/** The part of the attempt timeout that a batch may take. */
export const BATCH_TIMEOUT_SHARE = 1 / 4;
export const FIRST_PAUSE_MS = 1000;
export const LONGEST_PAUSE_MS = 60_000;
/** More than any valid claim has. */
export const MAX_CLAIM_BYTES = 1024;

/** A call to make: a batch, or one claim alone. */
export interface GatheredCall<C> {
  readonly claims: readonly C[];
  readonly round: number;
  readonly failures: number;
}

/** The claims that wait, and what is in flight. Times are in milliseconds, by one clock. */
export class Gathering<C> {
  waiting: C[] = [];
  /** Whether the last call was a batch: claims answered together are mostly followed by others. */
  together = false;
  /** Claims in calls of this round. */
  #inFlight = 0;
  /** A new one begins when the calls in flight turn out to be slow. */
  #round = 0;
  /** After the last batch that failed; 0 after a good one. */
  #pauseMs = 0;
  #resumeAt = 0;
  /** Whether the first batch after the pause is in flight. */
  #trying = false;
  /** Batches that failed, so that those in flight at the same time count once. */
  #failures = 0;

  /** Whether a claim may be gathered now. Otherwise it travels alone. */
  admits(now: number): boolean {
    return this.#pauseMs === 0 || (now >= this.#resumeAt && !this.#trying);
  }

  /** Add a claim. Returns the batch that it fills. */
  add(claim: C): GatheredCall<C> | undefined {
    this.waiting.push(claim);
    return this.waiting.length >= MAX_BATCH ? this.#leave() : undefined;
  }

  /** Whether claims wait for a call in flight. */
  get crowded(): boolean {
    return this.#inFlight >= CROWD;
  }

  /** Returns the call to make after the claims of one moment were added. */
  settle(): GatheredCall<C> | undefined {
    return this.crowded || this.waiting.length === 0 ? undefined : this.#leave();
  }

  /** Returns the call to make after another has ended; `failed` if that was a batch that failed as a whole. */
  ended(call: GatheredCall<C>, now: number, failed = false): GatheredCall<C> | undefined {
    if (call.claims.length > 1 && call.failures === this.#failures) {
      this.#trying = false;
      if (failed) {
        this.#failures++;
        this.#pauseMs = Math.min(Math.max(2 * this.#pauseMs, FIRST_PAUSE_MS), LONGEST_PAUSE_MS);
        this.#resumeAt = now + this.#pauseMs;
      } else {
        this.#pauseMs = 0;
      }
    }
    if (call.round === this.#round) this.#inFlight -= call.claims.length;
    return this.settle();
  }

  /** Returns the call to make after the longest wait. The calls in flight no longer hold claims back. */
  expired(): GatheredCall<C> | undefined {
    this.#inFlight = 0;
    this.#round++;
    return this.settle();
  }

  #leave(): GatheredCall<C> {
    const call = { claims: this.waiting, round: this.#round, failures: this.#failures };
    this.waiting = [];
    this.#inFlight += call.claims.length;
    this.together = call.claims.length > 1;
    this.#trying ||= this.#pauseMs > 0 && this.together;
    return call;
  }
}
