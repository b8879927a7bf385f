import assert from "node:assert/strict";
import { AsyncLocalStorage } from "node:async_hooks";
import { readFileSync } from "node:fs";
import { suite, test } from "node:test";
import { status } from "@grpc/grpc-js";
import { Channel } from "../src/channel.js";
import { Coalescer } from "../src/coalescer.js";
import { UnavailableError } from "../src/errors.js";
import * as gathering from "../src/gathering.js";
import type { BatchClaimTransactionsRequest, ClaimTransactionRequest } from "../src/gen/dedup/v1/dedup.js";
import { Client, DuplicateTransactionError, InvalidRequestError } from "../src/index.js";
import { Live, PATIENT, uniqueId, until } from "./harness/live.js";
import { CLAIMED, ManualTransport } from "./harness/manual-transport.js";
import { STORES } from "./harness/stores.js";

interface Event {
  at_ms: number;
  claims?: string[];
  ended?: number;
  failed?: boolean;
  expired?: boolean;
  calls?: string[][];
  alone?: string[];
}

const GOLDEN = JSON.parse(readFileSync(new URL("../../../golden/coalescing.json", import.meta.url), "utf8")) as {
  coalescing: object;
  sequences: { name: string; events: Event[] }[];
};

test("the rules of coalescing are those of the contract", () => {
  assert.deepEqual(GOLDEN.coalescing, {
    crowd: gathering.CROWD,
    max_batch: gathering.MAX_BATCH,
    max_delay_ms: gathering.MAX_DELAY_MS,
    batch_timeout_share: `1/${1 / gathering.BATCH_TIMEOUT_SHARE}`,
    first_pause_ms: gathering.FIRST_PAUSE_MS,
    longest_pause_ms: gathering.LONGEST_PAUSE_MS,
    max_claim_bytes: gathering.MAX_CLAIM_BYTES,
  });
});

for (const { name, events } of GOLDEN.sequences) {
  test(`coalescing: ${name}`, () => {
    const claims = new gathering.Gathering<string>();
    const made: gathering.GatheredCall<string>[] = [];
    for (const event of events) {
      const now = event.at_ms;
      const calls: (gathering.GatheredCall<string> | undefined)[] = [];
      const alone: string[] = [];
      for (const claim of event.claims ?? []) {
        if (claims.admits(now)) calls.push(claims.add(claim));
        else alone.push(claim);
      }
      if (event.ended !== undefined) calls.push(claims.ended(made[event.ended]!, now, event.failed));
      else calls.push(event.expired ? claims.expired() : claims.settle());
      const sent = calls.filter((call) => call !== undefined);
      made.push(...sent);
      assert.deepEqual(sent.map((call) => call.claims), event.calls ?? [], JSON.stringify(event));
      assert.deepEqual(alone, event.alone ?? [], JSON.stringify(event));
    }
  });
}

/** A client whose claims wait while as many as a crowd are in flight, however long. */
class Crowded {
  readonly transport = new ManualTransport();
  readonly client: Client;
  readonly #crowd: Promise<unknown>[];

  static async create(): Promise<Crowded> {
    const crowded = new Crowded();
    await until(() => crowded.transport.calls.length === gathering.CROWD);
    return crowded;
  }

  private constructor() {
    const coalescer = new Coalescer(this.transport, PATIENT.attemptTimeoutMs, 3_600_000);
    this.client = new Client(new Channel(this.transport, coalescer), PATIENT);
    this.#crowd = Array.from({ length: gathering.CROWD }, (_, number) => this.client.claim(`crowd-${number}`));
  }

  /** The calls after those of the crowd. */
  get calls() {
    return this.transport.calls.slice(gathering.CROWD);
  }

  /** The ids of the claims that were sent, by call. */
  get sent(): string[][] {
    return this.calls.map(({ request }) =>
      "requests" in (request as object)
        ? (request as BatchClaimTransactionsRequest).requests.map(({ transactionId }) => transactionId)
        : [(request as ClaimTransactionRequest).transactionId],
    );
  }

  /** End the calls of the crowd, so that what waits leaves. */
  async leave(): Promise<void> {
    for (const call of this.transport.calls.slice(0, gathering.CROWD)) call.answer(CLAIMED);
    await Promise.all(this.#crowd);
  }

  /** Answer a batch: CLAIMED for each entry, or what `of` returns. */
  answerBatch(index: number, of?: (request: ClaimTransactionRequest) => object): void {
    this.transport.answerBatch(index + gathering.CROWD, of);
  }
}

for (const store of Object.keys(STORES)) {
  suite(`coalescing on ${store}`, () => {
    test("concurrent claims of a client keep their guarantees", async () => {
      await using live = await Live.over(store);
      const client = live.client();
      const ids = Array.from({ length: 20 }, uniqueId);
      const outcomes = await Promise.allSettled([...ids, ...ids, ...ids, ""].map((id) => client.claim(id)));
      const refused = outcomes.flatMap((outcome) => (outcome.status === "rejected" ? [outcome.reason] : []));
      assert.equal(outcomes.length - refused.length, ids.length);
      assert.equal(refused.filter((error) => error instanceof DuplicateTransactionError).length, 2 * ids.length);
      const [invalid] = refused.filter((error) => !(error instanceof DuplicateTransactionError));
      assert.deepEqual(invalid.violations.map(({ field }: { field: string }) => field), ["transaction_id"]);
      for (const outcome of outcomes) if (outcome.status === "fulfilled") await outcome.value.complete("paid 5");
    });

    test("one of 64 callers of an id is granted the claim", async () => {
      await using live = await Live.over(store);
      const client = live.client();
      const id = uniqueId();
      const outcomes = await Promise.allSettled(Array.from({ length: 64 }, () => client.claim(id)));
      assert.equal(outcomes.filter(({ status }) => status === "fulfilled").length, 1);
      for (const outcome of outcomes) {
        if (outcome.status === "rejected") assert.ok(outcome.reason instanceof DuplicateTransactionError);
      }
    });

    test("claims whose batch lost its reply are retried with their tokens", async () => {
      for (const loss of ["break", "late"] as const) {
        await using live = await Live.over(store);
        const client = live.clientOfProxy({ attemptTimeoutMs: 4000 });
        await client.claim(uniqueId());
        // The first claims are sent alone, the others together.
        const ids = Array.from({ length: 12 }, uniqueId);
        let lost = 0;
        live.proxy.onLoss = () => lost++;
        live.proxy.losses = [loss, loss];
        const claims = await Promise.all(ids.map((id) => client.claim(id)));
        assert.ok(lost > 0);
        assert.ok(claims.some(({ replayed }) => replayed));
        const direct = live.client();
        for (const id of ids) await assert.rejects(direct.claim(id), DuplicateTransactionError);
        for (const claim of claims) await claim.complete();
      }
    });
  });
}

test("a claim alone leaves at once, and claims that find a crowd leave together", async () => {
  const crowd = await Crowded.create();
  assert.deepEqual(
    crowd.transport.calls.map(({ method }) => method),
    Array.from({ length: gathering.CROWD }, () => "ClaimTransaction"),
  );
  const claims = ["a", "b"].map((id) => crowd.client.claim(id));
  assert.equal(crowd.calls.length, 0);
  await crowd.leave();
  assert.equal(crowd.calls[0]!.method, "BatchClaimTransactions");
  assert.equal(crowd.calls[0]!.options.limitMs, PATIENT.attemptTimeoutMs / 4);
  crowd.answerBatch(0);
  const tokens = (await Promise.all(claims)).map(({ token }) => token);
  const { requests } = crowd.calls[0]!.request as BatchClaimTransactionsRequest;
  assert.deepEqual(requests.map(({ claimToken }) => claimToken), tokens);
  assert.equal(new Set(tokens).size, 2);
});

test("a slow call does not hold the next claims", async () => {
  const transport = new ManualTransport();
  const client = new Client(new Channel(transport, new Coalescer(transport, 60_000)), PATIENT);
  const slow = Array.from({ length: gathering.CROWD }, (_, number) => client.claim(`slow-${number}`));
  const next = ["a", "b"].map((id) => client.claim(id));
  await until(() => transport.calls.length === gathering.CROWD + 1);
  transport.answerBatch(gathering.CROWD);
  await Promise.all(next);
  for (const call of transport.calls.slice(0, gathering.CROWD)) call.answer(CLAIMED);
  await Promise.all(slow);
});

test("callers answered together leave together again", async () => {
  const crowd = await Crowded.create();
  const first = ["a", "b"].map((id) => crowd.client.claim(id));
  await crowd.leave();
  crowd.answerBatch(0);
  await Promise.all(first);
  const again = ["c", "d"].map((id) => crowd.client.claim(id));
  await until(() => crowd.calls.length === 2);
  crowd.answerBatch(1);
  await Promise.all(again);
  assert.deepEqual(crowd.sent, [["a", "b"], ["c", "d"]]);
});

test("each claim of a batch has its own error", async () => {
  const crowd = await Crowded.create();
  const [good, bad, silent] = [crowd.client.claim("good"), crowd.client.claim("bad"), crowd.client.claim("silent")];
  await crowd.leave();
  const error = { code: status.PERMISSION_DENIED, message: "not allowed", details: [] };
  const answers: Record<string, object> = { bad: { error }, good: { response: CLAIMED }, silent: {} };
  crowd.answerBatch(0, ({ transactionId }) => answers[transactionId]!);
  assert.ok(await good);
  await assert.rejects(bad!, { name: "UnavailableError", code: status.PERMISSION_DENIED });
  await assert.rejects(silent!, { name: "UnavailableError", applied: "unknown" });
});

test("a claim of a batch ends at its signal, and is released", async () => {
  const crowd = await Crowded.create();
  const controller = new AbortController();
  const patient = crowd.client.claim("patient");
  const aborted = crowd.client.claim("aborted", { signal: controller.signal });
  await crowd.leave();
  controller.abort(new Error("gone"));
  await assert.rejects(aborted, /gone/);
  await until(() => crowd.calls.length === 2);
  assert.equal(crowd.calls[1]!.method, "ReleaseTransaction");
  assert.equal((crowd.calls[1]!.request as { transactionId: string }).transactionId, "aborted");
  crowd.answerBatch(0);
  assert.ok(await patient);
});

test("a batch is cancelled once all its claims are", async () => {
  const crowd = await Crowded.create();
  const controller = new AbortController();
  const claims = ["a", "b"].map((id) => crowd.client.claim(id, { signal: controller.signal }));
  await crowd.leave();
  controller.abort(new Error("gone"));
  for (const claim of claims) await assert.rejects(claim, /gone/);
  assert.ok(crowd.calls[0]!.options.signal!.aborted);
});

test("a claim aborted before its batch is not sent", async () => {
  const crowd = await Crowded.create();
  const controller = new AbortController();
  const gone = crowd.client.claim("gone", { signal: controller.signal });
  const stays = ["a", "b"].map((id) => crowd.client.claim(id));
  controller.abort(new Error("gone"));
  await assert.rejects(gone, /gone/);
  await crowd.leave();
  const batches = crowd.calls.filter(({ method }) => method === "BatchClaimTransactions");
  assert.equal(batches.length, 1);
  const { requests } = batches[0]!.request as BatchClaimTransactionsRequest;
  assert.deepEqual(requests.map(({ transactionId }) => transactionId), ["a", "b"]);
  crowd.answerBatch(crowd.calls.indexOf(batches[0]!));
  await Promise.all(stays);
});

test("a claim that cannot share a call travels alone", async () => {
  const crowd = await Crowded.create();
  const options = [{ waitMs: 1000 }, { metadata: { "x-correlation-id": "click-1" } }, { timeoutMs: 14_000 }];
  for (const each of options) void crowd.client.claim("a", each).catch(() => undefined);
  void crowd.client.claim("x".repeat(2000)).catch(() => undefined);
  await until(() => crowd.calls.length === 4);
  assert.deepEqual(new Set(crowd.calls.map(({ method }) => method)), new Set(["ClaimTransaction"]));
});

test("a claim inside a sampled OpenTelemetry span travels alone", async () => {
  // What @opentelemetry/api 1.x keeps in the global object.
  const spans = new AsyncLocalStorage<{ spanContext(): { traceFlags: number } }>();
  const context = { active: () => ({ getValue: () => spans.getStore() }) };
  const globals = globalThis as { [key: symbol]: unknown };
  const key = Symbol.for("opentelemetry.js.api.1");
  globals[key] = { context };
  try {
    const crowd = await Crowded.create();
    const claim = (id: string, traceFlags: number) => spans.run({ spanContext: () => ({ traceFlags }) }, () => crowd.client.claim(id));
    const sampled = claim("sampled", 1);
    await until(() => crowd.calls.length === 1);
    assert.deepEqual(crowd.sent, [["sampled"]]);
    crowd.calls[0]!.answer(CLAIMED);
    await sampled;
    const unsampled = [claim("a", 0), claim("b", 0)];
    await crowd.leave();
    assert.deepEqual(crowd.sent, [["sampled"], ["a", "b"]]);
    crowd.answerBatch(1);
    await Promise.all(unsampled);
  } finally {
    delete globals[key];
  }
});

test("a batch that is refused is sent claim by claim", async () => {
  for (const code of [status.UNIMPLEMENTED, status.PERMISSION_DENIED, status.RESOURCE_EXHAUSTED, status.DEADLINE_EXCEEDED]) {
    const crowd = await Crowded.create();
    const claims = ["a", "b"].map((id) => crowd.client.claim(id));
    await crowd.leave();
    crowd.calls[0]!.answer(new UnavailableError("refused", { code, reason: "", applied: "unknown" }));
    await until(() => crowd.calls.length === 3);
    for (const call of crowd.calls.slice(1)) call.answer(CLAIMED);
    await Promise.all(claims);
    // Not gathered during the pause.
    void crowd.client.claim("c").catch(() => undefined);
    await until(() => crowd.calls.length === 4);
    assert.deepEqual(crowd.sent, [["a", "b"], ["a"], ["b"], ["c"]]);
  }
});

test("a batch without connection is retried claim by claim, after a pause", async () => {
  const crowd = await Crowded.create();
  const claims = ["a", "b"].map((id) => crowd.client.claim(id));
  await crowd.leave();
  crowd.calls[0]!.answer(new UnavailableError("gone", { code: status.UNAVAILABLE, reason: "", applied: "unknown" }));
  await until(() => crowd.calls.length === 3);
  const tokens = crowd.calls.slice(1).map(({ request }) => (request as ClaimTransactionRequest).claimToken);
  for (const call of crowd.calls.slice(1)) call.answer(CLAIMED);
  assert.deepEqual((await Promise.all(claims)).map(({ token }) => token).sort(), tokens.sort());
});

test("doubt about a batch stays", async () => {
  const refusal = { code: status.FAILED_PRECONDITION, reason: "VALUE_DAMAGED" };
  for (const applied of ["unknown", "no"] as const) {
    const crowd = await Crowded.create();
    const claims = ["a", "b"].map((id) => crowd.client.claim(id, { token: `the-token-of-claim-${id}` }));
    await crowd.leave();
    crowd.calls[0]!.answer(new UnavailableError("lost", { code: status.INTERNAL, reason: "", applied }));
    await until(() => crowd.calls.length === 3);
    for (const call of crowd.calls.slice(1)) call.answer(new UnavailableError("no", { ...refusal, applied: "no" }));
    for (const claim of claims) await assert.rejects(claim, { code: status.FAILED_PRECONDITION, applied });
  }
});

test("a wrong number of answers is not matched", async () => {
  const crowd = await Crowded.create();
  const claims = ["a", "b"].map((id) => crowd.client.claim(id));
  await crowd.leave();
  crowd.calls[0]!.answer({ entries: [{ response: CLAIMED }] });
  await until(() => crowd.calls.length === 3);
  for (const call of crowd.calls.slice(1)) call.answer(new InvalidRequestError("no", []));
  for (const claim of claims) await assert.rejects(claim, { name: "InvalidRequestError" });
});

test("closing ends the claims of a batch", async () => {
  await using live = await Live.over("sqlite");
  const client = live.clientOfProxy();
  await client.claim(uniqueId());
  const claims = Array.from({ length: 12 }, () => client.claim(uniqueId()));
  client.close();
  for (const claim of claims) await assert.rejects(claim, { name: "ClientClosedError" });
});

test("coalescing can be switched off", async () => {
  await using live = await Live.over("sqlite");
  const client = live.client({ coalesce: false });
  const id = uniqueId();
  const outcomes = await Promise.allSettled(Array.from({ length: 20 }, () => client.claim(id)));
  assert.equal(outcomes.filter(({ status }) => status === "fulfilled").length, 1);
});
