import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { mock, test } from "node:test";
import { status } from "@grpc/grpc-js";
import { Channel, type Budget } from "../src/channel.js";
import { NotHeldError, UnavailableError } from "../src/errors.js";
import { ReleaseOutcome } from "../src/gen/dedup/v1/dedup.js";
import { Client, type ClientOptions } from "../src/index.js";
import { withRetries } from "../src/retry.js";

interface Defaults {
  budget_ms: number;
  attempt_timeout_ms: number;
  first_backoff_ms: number;
  backoff_multiplier: number;
  longest_backoff_ms: number;
  jitter: string;
  on_unavailable: string;
  logged_ids: { transaction_id: string; logged: string }[];
}

const DEFAULTS = JSON.parse(readFileSync(new URL("../../../defaults.json", import.meta.url), "utf8")) as Defaults;
const OUTAGE = new UnavailableError("away", { code: status.UNAVAILABLE, reason: "", applied: "no" });

/** Calls a client whose channel answers with `answer`; returns the budgets of its calls and its warnings. */
async function offline(
  options: ClientOptions,
  answer: () => unknown,
  run: (client: Client) => Promise<unknown>,
): Promise<{ budgets: Budget[]; warnings: object[] }> {
  const budgets: Budget[] = [];
  const warnings: object[] = [];
  const logger = { warn: (_: string, details: object) => void warnings.push(details) };
  const call = mock.method(Channel.prototype, "call", async (_method: unknown, _request: unknown, budget: Budget) => {
    budgets.push(budget);
    return answer();
  });
  const client = new Client("127.0.0.1:1", { logger, ...options });
  try {
    await run(client);
  } finally {
    client.close();
    call.mock.restore();
  }
  return { budgets, warnings };
}

const outage = () => {
  throw OUTAGE;
};

/** Returns the pauses between attempts that all fail, with `chance` as the random number. */
async function pauses(chance: number, retryAfterMs?: number): Promise<number[]> {
  const slept: number[] = [];
  let time = 0;
  const clock = {
    now: () => time,
    random: () => chance,
    sleep: async (ms: number) => {
      slept.push(ms);
      time += ms;
    },
  };
  const failing = () => Promise.reject(new UnavailableError("away", { ...OUTAGE, retryAfterMs }));
  await assert.rejects(withRetries(8000, undefined, failing, clock), UnavailableError);
  return slept;
}

test("the budget and the attempt timeout are those of every client", async () => {
  const { budgets } = await offline({}, outage, (client) =>
    assert.rejects(client.claim("order-1234", { waitMs: 5000 }), OUTAGE),
  );
  assert.deepEqual(
    budgets.map(({ timeoutMs, attemptTimeoutMs }) => ({ timeoutMs, attemptTimeoutMs })),
    [{ timeoutMs: DEFAULTS.budget_ms, attemptTimeoutMs: DEFAULTS.attempt_timeout_ms }],
  );
});

test("the backoff is that of every client, with full jitter", async () => {
  assert.equal(DEFAULTS.jitter, "full");
  const { first_backoff_ms: first, backoff_multiplier: multiplier, longest_backoff_ms: longest } = DEFAULTS;
  const halves = await pauses(0.5);
  assert.ok(halves.length > 8);
  assert.deepEqual(
    halves,
    halves.map((_, index) => Math.min(longest, first * multiplier ** index) / 2),
  );
  assert.deepEqual((await pauses(0, 2000)).slice(0, 3), [2000, 2000, 2000]);
});

test("the service being unavailable is handled as in every client", async () => {
  assert.equal(DEFAULTS.on_unavailable, "deny");
  await offline({}, outage, (client) => assert.rejects(client.claim("order-1234"), OUTAGE));
});

for (const { transaction_id, logged } of DEFAULTS.logged_ids) {
  test(`logs name a transaction as every client does: ${logged}`, async () => {
    const allowed = await offline({ onUnavailable: "allow" }, outage, (client) => client.claim(transaction_id));
    assert.deepEqual(allowed.warnings, [
      { transaction: logged, code: status.UNAVAILABLE, reason: "", applied: "no" },
    ]);
  });

  test(`the log of a failed release does not contain the transaction id: ${logged}`, async () => {
    const answers: unknown[] = [
      { reply: { outcome: 1, replayed: false, shadowDuplicate: false }, doubt: false },
      { reply: { outcome: ReleaseOutcome.RELEASE_OUTCOME_NOT_HELD }, doubt: false },
    ];
    const { warnings } = await offline({}, () => answers.shift(), (client) =>
      assert.rejects(
        client.once(transaction_id, { releaseOn: [Error] }, () => Promise.reject(new Error("no money"))),
        /no money/,
      ),
    );
    assert.deepEqual(warnings, [{ transaction: logged, error: NotHeldError.name }]);
  });
}
