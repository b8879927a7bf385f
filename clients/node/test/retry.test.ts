import assert from "node:assert/strict";
import { test } from "node:test";
import { status } from "@grpc/grpc-js";
import { UnavailableError, type Failure } from "../src/errors.js";
import { withRetries, type Clock } from "../src/retry.js";

/** A clock that advances only during sleeps. */
class FakeClock implements Clock {
  time = 0;
  pauses: number[] = [];
  constructor(private readonly chance: number) {}
  now = () => this.time;
  random = () => this.chance;
  sleep = async (ms: number) => {
    this.pauses.push(ms);
    this.time += ms;
  };
}

/** Return an attempt that takes `ms` and fails with the next of `failures`; the last one repeats. */
function failing(clock: FakeClock, ms: number, ...failures: Partial<Failure>[]) {
  const seen: number[] = [];
  const attempt = async ({ leftMs }: { leftMs: number }): Promise<never> => {
    const failure = failures[Math.min(seen.length, failures.length - 1)];
    seen.push(leftMs);
    clock.time += Math.min(ms, leftMs);
    throw new UnavailableError("no", { code: status.UNAVAILABLE, reason: "", applied: "no", ...failure });
  };
  return { attempt, seen };
}

test("attempts and pauses never exceed the budget", async () => {
  for (const chance of [0, 0.3, 0.999]) {
    const clock = new FakeClock(chance);
    const { attempt, seen } = failing(clock, 300, {});
    await assert.rejects(withRetries(2000, undefined, attempt, clock), UnavailableError);
    assert.ok(clock.time <= 2000, `${clock.time} ms with chance ${chance}`);
    assert.ok(seen.length >= 3 && seen.length <= 7, `${seen.length} attempts with chance ${chance}`);
    assert.ok(seen.every((leftMs) => leftMs > 0));
  }
});

test("a budget used up by one attempt allows no retry", async () => {
  const clock = new FakeClock(0.5);
  const { attempt, seen } = failing(clock, 5000, { code: status.DEADLINE_EXCEEDED });
  await assert.rejects(withRetries(2000, undefined, attempt, clock), UnavailableError);
  assert.deepEqual(seen, [2000]);
  assert.deepEqual(clock.pauses, []);
});

test("the backoff doubles up to one second", async () => {
  const clock = new FakeClock(0.5);
  const { attempt } = failing(clock, 0, {});
  await assert.rejects(withRetries(3000, undefined, attempt, clock), UnavailableError);
  assert.deepEqual(clock.pauses, [25, 50, 100, 200, 400, 500, 500, 500, 500]);
});

test("the pause is the service's delay plus jitter", async () => {
  const clock = new FakeClock(0.5);
  const { attempt } = failing(clock, 0, { reason: "STORE_LOADING", retryAfterMs: 200 });
  await assert.rejects(withRetries(600, undefined, attempt, clock), UnavailableError);
  assert.deepEqual(clock.pauses, [225, 250]);
});

test("a delay beyond the budget ends the call at once", async () => {
  const clock = new FakeClock(0.5);
  const { attempt, seen } = failing(clock, 0, { reason: "STORE_LOADING", retryAfterMs: 2000 });
  await assert.rejects(withRetries(2000, undefined, attempt, clock), { name: "UnavailableError", reason: "STORE_LOADING" });
  assert.equal(seen.length, 1);
});

for (const code of [status.UNAVAILABLE, status.RESOURCE_EXHAUSTED, status.DEADLINE_EXCEEDED, status.CANCELLED]) {
  test(`an error of gRPC or of a server in shutdown is retried: ${status[code]}`, async () => {
    const clock = new FakeClock(0.5);
    const { attempt, seen } = failing(clock, 0, { code });
    await assert.rejects(withRetries(100, undefined, attempt, clock), { code });
    assert.ok(seen.length > 1);
  });
}

for (const failure of [
  { code: status.FAILED_PRECONDITION, reason: "VALUE_DAMAGED" },
  { code: status.INTERNAL, reason: "INTERNAL" },
  { code: status.UNAVAILABLE, reason: "STORE_REFUSED" },
  { code: status.UNIMPLEMENTED },
]) {
  test(`a final error is not retried: ${failure.reason ?? status[failure.code]}`, async () => {
    const clock = new FakeClock(0.5);
    const { attempt, seen } = failing(clock, 0, failure);
    await assert.rejects(withRetries(2000, undefined, attempt, clock), failure);
    assert.equal(seen.length, 1);
  });
}

test("one attempt in doubt leaves the whole call in doubt", async () => {
  const clock = new FakeClock(0.5);
  const last = { reason: "STORE_REFUSED", applied: "no" } as const;
  const { attempt } = failing(clock, 0, { applied: "unknown" }, last);
  await assert.rejects(withRetries(2000, undefined, attempt, clock), { reason: "STORE_REFUSED", applied: "unknown" });
});

test("an abort during a pause ends the call with the reason of the signal", async () => {
  const { attempt, seen } = failing(new FakeClock(0), 0, { retryAfterMs: 30_000, reason: "STORE_LOADING" });
  const controller = new AbortController();
  const call = withRetries(60_000, controller.signal, async (given) => {
    // Abort only after the pause has started.
    setImmediate(() => controller.abort(new Error("enough")));
    return attempt(given);
  });
  await assert.rejects(call, /enough/);
  assert.equal(seen.length, 1);
});
