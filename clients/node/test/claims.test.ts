import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, suite, test } from "node:test";
import { Client, DuplicateTransactionError, NotHeldError, ResultNotStoredError } from "../src/index.js";
import { Live, PATIENT, uniqueId, until } from "./harness/live.js";
import { Service } from "./harness/service.js";
import { STORES, sqliteStore, temporaryFolder } from "./harness/stores.js";

interface Vectors {
  claim_tokens: { valid: string[]; invalid: string[] };
}

const vectors = JSON.parse(readFileSync(new URL("../../../golden_vectors.json", import.meta.url), "utf8")) as Vectors;

for (const store of Object.keys(STORES)) {
  suite(`claims on ${store}`, () => {
    let live: Live;
    let client: Client;
    before(async () => {
      live = await Live.over(store);
      client = live.client({ claimant: "the tests" });
    });
    after(() => live[Symbol.asyncDispose]());

    test("one of 100 concurrent callers gets the claim and 99 are duplicates", async () => {
      const id = uniqueId();
      const outcomes = await Promise.allSettled(Array.from({ length: 100 }, () => client.claim(id)));
      const refused = outcomes.flatMap((outcome) => (outcome.status === "rejected" ? [outcome.reason] : []));
      assert.equal(outcomes.length - refused.length, 1);
      for (const error of refused) assert.ok(error instanceof DuplicateTransactionError, error);
    });

    test("a duplicate receives the holder, and the result once completed", async () => {
      const id = uniqueId();
      const claim = await client.claim(id, { ttlMs: 3_600_000 });
      assert.deepEqual([claim.replayed, claim.failOpen, claim.shadowDuplicate], [false, false, false]);
      const holder = await duplicateOf(client, id);
      assert.deepEqual([holder.state, holder.claimant, holder.completionTime], ["in progress", "the tests", undefined]);
      assert.equal(holder.expireTime!.getTime() - holder.claimTime!.getTime(), 3_600_000);
      await claim.complete("paid 5");
      const completed = await duplicateOf(client, id);
      assert.deepEqual([completed.state, completed.result.toString()], ["completed", "paid 5"]);
      assert.ok(completed.completionTime instanceof Date);
    });

    test("a completion is repeatable and sets its expiry", async () => {
      const claim = await client.claim(uniqueId());
      const expireTime = new Date(Date.now() + 7_200_000);
      await claim.complete(Buffer.from([0, 255]), { expireTime });
      await claim.complete(Buffer.from([0, 255]), { expireTime });
      const found = await client.get(claim.transactionId);
      assert.deepEqual([found!.result, found!.expireTime], [Buffer.from([0, 255]), expireTime]);
    });

    test("a released transaction is absent and can be claimed again", async () => {
      const id = uniqueId();
      await (await client.claim(id)).release();
      assert.equal(await client.get(id), undefined);
      assert.equal((await client.claim(id)).replayed, false);
    });

    test("an extension postpones the expiry", async () => {
      const claim = await client.claim(uniqueId(), { ttlMs: 60_000 });
      const end = claim.transaction!.expireTime!;
      await claim.extend(3_600_000);
      assert.ok(claim.transaction!.expireTime! > end);
    });

    test("a claim no longer held cannot be completed, released or extended", async () => {
      const claim = await client.claim(uniqueId());
      await claim.release();
      const expected = { name: "NotHeldError", transactionId: claim.transactionId };
      await assert.rejects(claim.complete(), expected);
      await assert.rejects(claim.release(), expected);
      await assert.rejects(claim.extend(60_000), expected);
    });

    test("a claim with the same token is replayed", async () => {
      const id = uniqueId();
      const { token } = await client.claim(id);
      assert.equal((await client.claim(id, { token })).replayed, true);
    });

    test("another fingerprint is a mismatch", async () => {
      const id = uniqueId();
      await client.claim(id, { fingerprint: "sha-of-5" });
      await assert.rejects(client.claim(id, { fingerprint: "sha-of-6" }), { name: "PayloadMismatchError" });
    });

    test("namespaces separate equal ids", async () => {
      const id = uniqueId();
      await client.claim(id);
      const claim = await client.claim(id, { namespace: "refunds" });
      await claim.complete();
      assert.equal((await client.get(id, { namespace: "refunds" }))!.state, "completed");
      assert.equal((await client.get(id))!.state, "in progress");
    });

    test("a waiting duplicate is answered when the work ends", async () => {
      const id = uniqueId();
      const claim = await client.claim(id);
      const waiting = client.claim(id, { waitMs: 60_000 });
      await claim.complete("done");
      await assert.rejects(waiting, (error: DuplicateTransactionError) => error.holder.result.toString() === "done");
    });

    test("a claim can expire at a given time", async () => {
      const expireTime = new Date(Date.now() + 600_000);
      const claim = await client.claim(uniqueId(), { expireTime });
      assert.deepEqual(claim.transaction!.expireTime, expireTime);
    });

    test("an invalid request names its invalid fields", async () => {
      await assert.rejects(client.claim("", { namespace: "NO" }), (error: { name: string; violations: object[] }) => {
        assert.equal(error.name, "InvalidRequestError");
        assert.deepEqual(error.violations.map((v) => (v as { field: string }).field).sort(), ["namespace", "transaction_id"]);
        return true;
      });
    });

    test("once completes successful work and returns its value", async () => {
      const id = uniqueId();
      assert.equal(await client.once(id, {}, async () => 42), 42);
      assert.equal((await client.get(id))!.state, "completed");
      await assert.rejects(
        client.once(id, {}, () => assert.fail("done twice")),
        DuplicateTransactionError,
      );
    });

    test("once keeps the result of a completion by the work", async () => {
      const id = uniqueId();
      await client.once(id, {}, (claim) => claim.complete("paid 5"));
      assert.equal((await client.get(id))!.result.toString(), "paid 5");
    });

    test("once keeps the claim of failed work, since its effect is unknown, and rethrows the error", async () => {
      const id = uniqueId();
      const broken = new Error("no answer from the bank");
      await assert.rejects(
        client.once(id, { releaseOn: [RangeError] }, () => Promise.reject(broken)),
        (error) => error === broken,
      );
      assert.equal((await client.get(id))!.state, "in progress");
    });

    for (const [how, releaseOn] of [
      ["class", [TypeError, RangeError]],
      ["predicate", (error: unknown) => (error as Error).message === "no money"],
    ] as const) {
      test(`once releases the claim of work that did nothing, by ${how}`, async () => {
        const id = uniqueId();
        await assert.rejects(
          client.once(id, { releaseOn }, () => Promise.reject(new RangeError("no money"))),
          RangeError,
        );
        assert.equal(await client.get(id), undefined);
      });
    }

    test("once reports a claim lost during the work", async () => {
      const id = uniqueId();
      const work = async () => (await client.claim(id, { token: "the-same-token-16" })).release();
      await assert.rejects(client.once(id, { token: "the-same-token-16" }, work), NotHeldError);
    });

    for (const [what, result] of [
      ["a number", 5],
      ["an object", { paid: 5 }],
      ["null", null],
      ["a lone surrogate", "\ud800"],
      ["too large for the service", "x".repeat(4097)],
      ["too large for a message", "x".repeat(10_000_000)],
    ] as const) {
      test(`work whose result cannot be stored is completed once: ${what}`, async () => {
        const id = uniqueId();
        let error: unknown;
        await assert.rejects(
          client.once(id, {}, async (claim) => {
            error = await claim.complete(result as string).catch((error: unknown) => error);
            throw error;
          }),
          (thrown) => thrown === error,
        );
        assert.ok(error instanceof ResultNotStoredError, String(error));
        assert.match(error.message, /completed without its result: result: /);
        const holder = await duplicateOf(client, id);
        assert.deepEqual([holder.state, holder.result.length], ["completed", 0]);
      });
    }

    test("an extension shortens a claim only where that is permitted", async () => {
      const claim = await client.claim(uniqueId(), { ttlMs: 3_600_000 });
      const end = claim.transaction!.expireTime!;
      await claim.extend(60_000);
      assert.deepEqual(claim.transaction!.expireTime, end);
      await claim.extend(60_000, { allowShortening: true });
      assert.ok(claim.transaction!.expireTime! < end);
    });

    test("a claim that may have been made by an aborted call is released in the background", async () => {
      const ids = Array.from({ length: 30 }, uniqueId);
      await client.claim(uniqueId());
      await Promise.all(
        ids.map(async (id, index) => {
          const controller = new AbortController();
          const call = client.claim(id, { ttlMs: 3_600_000, signal: controller.signal });
          // At different moments of the call.
          for (let turn = 0; turn < index % 6; turn++) await new Promise((resolve) => setImmediate(resolve));
          controller.abort(new Error("gone"));
          await call.then((claim) => claim.release(), () => undefined);
        }),
      );
      for (const id of ids) await until(async () => (await client.get(id)) === undefined);
    });

    test("the service logs a failed call under the correlation id of its caller", async () => {
      const metadata = { "x-correlation-id": `click-${uniqueId()}` };
      await assert.rejects(client.claim("", { metadata }), { name: "InvalidRequestError" });
      await until(async () => live.service.log.some((entry) => JSON.stringify(entry).includes(metadata["x-correlation-id"])));
    });

    test("the service accepts and rejects the shared token vectors", async () => {
      for (const token of vectors.claim_tokens.valid) await client.claim(uniqueId(), { token });
      for (const token of vectors.claim_tokens.invalid) {
        await assert.rejects(client.claim(uniqueId(), { token }), { name: "InvalidRequestError" }, JSON.stringify(token));
      }
    });
  });
}

test("a client connects to a Unix socket", async () => {
  await using folder = await temporaryFolder();
  await using store = await sqliteStore();
  await using service = await Service.start(store.url, `unix://${join(folder.path, "dedup.sock")}`);
  const client = new Client(service.address, PATIENT);
  try {
    assert.match(service.address, /^unix:\/\/\//);
    assert.equal(await client.once("order", {}, () => "went"), "went");
  } finally {
    client.close();
  }
});

async function duplicateOf(client: Client, id: string) {
  const error: unknown = await client.claim(id).catch((error: unknown) => error);
  assert.ok(error instanceof DuplicateTransactionError);
  return error.holder;
}
