import { setTimeout as sleepFor } from "node:timers/promises";
import { BACKOFF_MULTIPLIER, FIRST_BACKOFF_MS, LONGEST_BACKOFF_MS } from "./defaults.js";
import { UnavailableError, type Applied } from "./errors.js";
import { isRetryable } from "./failure.js";

/** Time and chance, which tests bring along themselves. */
export interface Clock {
  /** Milliseconds that never go back. */
  now(): number;
  sleep(ms: number, signal: AbortSignal | undefined): Promise<void>;
  /** At least 0 and less than 1. */
  random(): number;
}

export const systemClock: Clock = {
  now: () => performance.now(),
  sleep: (ms, signal) => sleepFor(ms, undefined, { signal }),
  random: Math.random,
};

/** What one attempt is told. */
export interface Attempt {
  /** How much of the budget is left; the attempt has to end within it. */
  leftMs: number;
  /** Whether an earlier attempt may have been applied. */
  doubt: boolean;
}

/**
 * Makes attempts until one is answered, a retry cannot help, or the budget does not reach to the next one.
 *
 * No attempt begins after the budget. What is thrown then says "applied: no" only if every attempt said so. Throws the
 * reason of the signal when that aborts.
 */
export async function withRetries<T>(
  budgetMs: number,
  signal: AbortSignal | undefined,
  attempt: (attempt: Attempt) => Promise<T>,
  clock: Clock = systemClock,
): Promise<T> {
  const end = clock.now() + budgetMs;
  let leftMs = budgetMs;
  let applied: Applied = "no";
  for (let backoffMs = FIRST_BACKOFF_MS; ; backoffMs = Math.min(backoffMs * BACKOFF_MULTIPLIER, LONGEST_BACKOFF_MS)) {
    signal?.throwIfAborted();
    try {
      return await attempt({ leftMs, doubt: applied === "unknown" });
    } catch (error) {
      if (!(error instanceof UnavailableError)) throw error;
      if (error.applied === "unknown") applied = "unknown";
      // Full jitter, and after the wait that the service asks for: callers that failed together come back apart.
      const pauseMs = (error.retryAfterMs ?? 0) + clock.random() * backoffMs;
      leftMs = end - clock.now() - pauseMs;
      if (isRetryable(error) && leftMs > 0) {
        await pause(pauseMs, signal, clock);
        leftMs = end - clock.now();
        if (leftMs > 0) continue;
      }
      throw new UnavailableError(error.message, { ...failureOf(error), applied }, { cause: error.cause });
    }
  }
}

async function pause(ms: number, signal: AbortSignal | undefined, clock: Clock): Promise<void> {
  try {
    await clock.sleep(ms, signal);
  } catch (error) {
    // Timers throw an AbortError of their own, and the caller waits for the reason that it gave.
    signal?.throwIfAborted();
    throw error;
  }
}

function failureOf({ code, reason, retryAfterMs }: UnavailableError) {
  return { code, reason, retryAfterMs };
}
