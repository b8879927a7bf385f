import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { suite, test } from "node:test";
import { KeepAlive, MAX_HOLD_MS, type Holding, type Timers } from "../src/keep-alive.js";
import { ClaimLostError, NotHeldError } from "../src/index.js";
import { FakeClient } from "../src/testing.js";
import { Live, uniqueId, until } from "./harness/live.js";
import { STORES } from "./harness/stores.js";

interface Vectors {
  keep_alive: { max_hold_ms: number };
  cases: { lease_ms: number; jitter: number; next_extension_ms: number; repeat_ms: number; lost_after_ms: number }[];
}

const vectors = JSON.parse(readFileSync(new URL("../../../golden/keep_alive.json", import.meta.url), "utf8")) as Vectors;

/** Timers that fire when the clock is advanced. */
class FakeTimers implements Timers {
  time = 0;
  set = 0;
  readonly #pending = new Map<object, { at: number; run: () => void }>();
  constructor(private readonly chance: number) {}
  get pending(): number {
    return this.#pending.size;
  }
  now = () => this.time;
  random = () => this.chance;
  after = (ms: number, run: () => void) => {
    const timer = {};
    this.set++;
    this.#pending.set(timer, { at: this.time + ms, run });
    return () => void this.#pending.delete(timer);
  };
  async advance(ms: number): Promise<void> {
    const end = this.time + ms;
    for (;;) {
      const [next] = [...this.#pending].filter(([, { at }]) => at <= end).sort(([, a], [, b]) => a.at - b.at);
      if (next === undefined) break;
      this.#pending.delete(next[0]);
      this.time = next[1].at;
      next[1].run();
      await new Promise((resolve) => setImmediate(resolve));
    }
    this.time = end;
  }
}

/** Holds one claim; `answer` is that of each extension. Returns the times of its events. */
function held(timers: FakeTimers, keepAlive: KeepAlive, leaseMs: number, answer: () => Promise<boolean>, more: Partial<Holding> = {}) {
  const sent: number[] = [];
  const ttls: number[] = [];
  const losses: number[] = [];
  const lease = keepAlive.hold({
    leaseMs,
    sentAt: timers.time,
    maxHoldMs: 1e12,
    replayed: false,
    extend: (ttlMs) => {
      sent.push(timers.time);
      ttls.push(ttlMs);
      return answer();
    },
    lost: () => void losses.push(timers.time),
    ...more,
  });
  return { lease, sent, ttls, losses };
}

const never = () => new Promise<boolean>(() => undefined);
const yes = async () => true;
const close = (actual: number, expected: number) => assert.ok(Math.abs(actual - expected) < 1e-3 * expected, `${actual}, not ${expected}`);

for (const { lease_ms, jitter, next_extension_ms, repeat_ms, lost_after_ms } of vectors.cases) {
  for (const [how, answer] of [["unanswered", never], ["failing", () => Promise.reject(new Error("away"))]] as const) {
    test(`an ${how} extension of ${lease_ms} ms is timed as in every client, with jitter ${jitter}`, async () => {
      const timers = new FakeTimers(jitter);
      const { sent, losses } = held(timers, new KeepAlive(timers), lease_ms, answer);
      await timers.advance(2 * lease_ms);
      close(sent[0]!, next_extension_ms);
      assert.ok(sent.length > 3);
      for (let at = 1; at < sent.length; at++) close(sent[at]! - sent[at - 1]!, repeat_ms);
      assert.equal(losses.length, 1);
      close(losses[0]!, lost_after_ms);
      assert.ok(sent.at(-1)! < losses[0]!);
    });
  }

  test(`an extended lease of ${lease_ms} ms is extended at the same pace, with jitter ${jitter}`, async () => {
    const timers = new FakeTimers(jitter);
    const { lease, sent, losses } = held(timers, new KeepAlive(timers), lease_ms, yes);
    await timers.advance(5 * lease_ms);
    for (let at = 1; at < sent.length; at++) close(sent[at]! - sent[at - 1]!, next_extension_ms);
    lease.end();
    await timers.advance(5 * lease_ms);
    assert.ok(sent.at(-1)! <= 5 * lease_ms);
    assert.deepEqual([losses, timers.pending], [[], 0]);
  });
}

test("no extension ends later than the longest hold, and the claim is then lost", async () => {
  assert.equal(MAX_HOLD_MS, vectors.keep_alive.max_hold_ms);
  const timers = new FakeTimers(0);
  const { sent, ttls, losses } = held(timers, new KeepAlive(timers), 60_000, yes, { maxHoldMs: 90_000 });
  await timers.advance(200_000);
  assert.ok(sent.every((at, index) => at + ttls[index]! <= 90_000));
  assert.equal(sent.at(-1)! + ttls.at(-1)!, 90_000);
  assert.equal(losses.length, 1);
  assert.ok(losses[0]! < 90_000 && losses[0]! > 80_000, String(losses));
});

test("a replayed claim is extended at once", async () => {
  const timers = new FakeTimers(0);
  const { sent } = held(timers, new KeepAlive(timers), 60_000, yes, { replayed: true });
  await timers.advance(1);
  assert.deepEqual(sent, [0]);
});

test("a claim that is not held is lost at once", async () => {
  const timers = new FakeTimers(0);
  const { losses } = held(timers, new KeepAlive(timers), 60_000, async () => false);
  await timers.advance(60_000);
  assert.deepEqual([losses, timers.pending], [[20_000], 0]);
});

test("the lease counts from when the extension was sent, not from its answer", async () => {
  const timers = new FakeTimers(0);
  let answered = 0;
  const late = () => (answered++ === 0 ? new Promise<boolean>((resolve) => timers.after(25_000, () => resolve(true))) : never());
  const { losses } = held(timers, new KeepAlive(timers), 60_000, late);
  await timers.advance(200_000);
  assert.deepEqual(losses, [20_000 + 54_000]);
});

test("one timer serves every claim of a client", async () => {
  const timers = new FakeTimers(0);
  const keepAlive = new KeepAlive(timers);
  const all = Array.from({ length: 1000 }, () => held(timers, keepAlive, 60_000, yes));
  assert.equal(timers.pending, 1);
  await timers.advance(30_000);
  assert.equal(timers.pending, 1);
  assert.ok(all.every(({ sent }) => sent.length === 1));
  assert.ok(timers.set < 10, `${timers.set} timers`);
});

test("work is told of the loss before its lease ends, with a ClaimLostError", async () => {
  const client = new FakeClient();
  let outcome: unknown;
  await client.once("order", {}, async (claim) => {
    assert.equal(claim.lost, false);
    client.service.unavailable = true;
    await client.service.advance(55_000);
    outcome = [claim.lost, claim.signal.reason];
    client.service.unavailable = false;
  });
  const [lost, reason] = outcome as [boolean, unknown];
  assert.equal(lost, true);
  assert.ok(reason instanceof ClaimLostError);
  // The completion was tried after the loss: the service still held the claim.
  assert.equal((await client.get("order"))!.state, "completed");
});

test("an explicit claim is extended only where that is asked, and never with an end of its own", async () => {
  const client = new FakeClient();
  const expireTime = new Date(Date.now() + 60_000);
  const service = client.service;
  await client.claim("a");
  await client.claim("b", { keepAlive: true });
  await client.claim("c", { keepAlive: true, expireTime });
  await service.advance(59_000);
  const extended = service.calls.filter(({ method }) => method === "ExtendTransaction");
  assert.ok(extended.length > 0);
  assert.ok(extended.every(({ request }) => (request as { transactionId: string }).transactionId === "b"));
});

test("shortening ends keep-alive", async () => {
  const client = new FakeClient();
  const claim = await client.claim("order", { keepAlive: true });
  await claim.extend(5_000, { allowShortening: true });
  await client.service.advance(6_000);
  assert.equal(await client.get("order"), undefined);
});

test("a claim without a claim is not extended", async () => {
  const client = new FakeClient(undefined, { onUnavailable: "allow", logger: { warn: () => undefined } });
  client.service.unavailable = true;
  await client.once("order", {}, async (claim) => {
    assert.equal(claim.failOpen, true);
    await client.service.advance(600_000);
    assert.equal(claim.lost, false);
  });
  assert.ok(client.service.calls.every(({ method }) => method === "ClaimTransaction"));
});

for (const store of Object.keys(STORES)) {
  suite(`keep-alive on ${store}`, () => {
    test("work of several ttls runs once", async () => {
      await using live = await Live.over(store);
      const client = live.client();
      const id = uniqueId();
      await client.once(id, { ttlMs: 3000 }, async (claim) => {
        const end = claim.transaction!.expireTime!.getTime();
        // The store's clock has passed the first lease, and a part of it again.
        await until(async () => claim.lost || (await client.get(id))?.expireTime!.getTime()! > end + 4000);
        assert.equal(claim.lost, false);
        await assert.rejects(client.claim(id), { name: "DuplicateTransactionError" });
      });
      assert.equal((await client.get(id))!.state, "completed");
    });

    test("work whose service is away is told of the loss", async () => {
      await using live = await Live.over(store);
      const client = live.client({ timeoutMs: 1000, attemptTimeoutMs: 500 });
      const claim = await client.claim(uniqueId(), { ttlMs: 3000, keepAlive: true });
      await live.service.kill();
      await until(() => claim.lost);
      assert.ok(claim.signal.reason instanceof ClaimLostError);
    });

    test("work whose claim was released by another is told of the loss", async () => {
      await using live = await Live.over(store);
      const client = live.client();
      const claim = await client.claim(uniqueId(), { ttlMs: 3000, keepAlive: true });
      await (await client.claim(claim.transactionId, { token: claim.token })).release();
      await until(() => claim.lost);
      await assert.rejects(claim.complete(), NotHeldError);
    });
  });
}
