import { setTimeout as sleepFor } from "node:timers/promises";
import { BACKOFF_MULTIPLIER, FIRST_BACKOFF_MS, LONGEST_BACKOFF_MS } from "./defaults.js";
import { UnavailableError, type Applied } from "./errors.js";
import { isRetryable } from "./failure.js";

/** Replaced in tests. */
export interface Clock {
  /** Monotonic milliseconds. */
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

export interface Attempt {
  /** The rest of the budget; the attempt must end within it. */
  leftMs: number;
  /** True if an earlier attempt may have been applied. */
  doubt: boolean;
  /** True for all but the first. */
  again: boolean;
}

/**
 * Make attempts until one succeeds, an error is final, or the budget ends before the next.
 *
 * The error thrown has `applied` "no" only if every attempt had. Throws the reason of the signal if it aborts.
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
  let again = false;
  for (let backoffMs = FIRST_BACKOFF_MS; ; backoffMs = Math.min(backoffMs * BACKOFF_MULTIPLIER, LONGEST_BACKOFF_MS)) {
    signal?.throwIfAborted();
    try {
      return await attempt({ leftMs, doubt: applied === "unknown", again });
    } catch (error) {
      again = true;
      if (!(error instanceof UnavailableError)) throw error;
      if (error.applied === "unknown") applied = "unknown";
      // Full jitter spreads the retries of callers that failed together.
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
    // Timers throw their own AbortError, not the signal's reason.
    signal?.throwIfAborted();
    throw error;
  }
}

function failureOf({ code, reason, retryAfterMs }: UnavailableError) {
  return { code, reason, retryAfterMs };
}
