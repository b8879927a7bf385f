import assert from "node:assert/strict";
import { after, before, beforeEach, suite, test } from "node:test";
import { DuplicateTransactionError } from "../src/index.js";
import { Live, uniqueId } from "./harness/live.js";
import type { Loss } from "./harness/lossy-proxy.js";
import { STORES } from "./harness/stores.js";

for (const store of Object.keys(STORES)) {
  suite(`failures on ${store}`, () => {
    let live: Live;
    before(async () => {
      live = await Live.over(store);
    });
    after(() => live[Symbol.asyncDispose]());
    beforeEach(() => {
      live.proxy.losses = [];
      live.proxy.onLoss = undefined;
    });

    for (const losses of [["break"], ["late"], ["break", "late", "break"]] satisfies Loss[][]) {
      test(`a claim whose reply is lost is replayed: ${losses}`, async () => {
        // A late reply needs an attempt timeout; the next attempt is then replayed.
        const client = live.clientOfProxy({ attemptTimeoutMs: losses.includes("late") ? 400 : 60_000 });
        const id = uniqueId();
        live.proxy.losses = [...losses];
        const claim = await client.claim(id);
        assert.deepEqual(live.proxy.losses, []);
        assert.equal(claim.replayed, true);
        await assert.rejects(live.client().claim(id), DuplicateTransactionError);
        await claim.complete();
      });
    }

    test("a completion whose reply is lost succeeds", async () => {
      const claim = await live.clientOfProxy().claim(uniqueId());
      live.proxy.losses = ["break"];
      await claim.complete("paid 5");
      assert.deepEqual(live.proxy.losses, []);
      assert.equal((await live.client().get(claim.transactionId))!.result.toString(), "paid 5");
    });

    test("a release whose reply is lost succeeds", async () => {
      const claim = await live.clientOfProxy().claim(uniqueId());
      live.proxy.losses = ["break"];
      await claim.release();
      assert.deepEqual(live.proxy.losses, []);
      assert.equal(await live.client().get(claim.transactionId), undefined);
    });

    test("an extension whose reply is lost succeeds", async () => {
      const claim = await live.clientOfProxy().claim(uniqueId());
      live.proxy.losses = ["break"];
      await claim.extend(3_600_000);
      assert.deepEqual(live.proxy.losses, []);
    });

    test("after a budget that ended in doubt, the same token finds the claim", async () => {
      const id = uniqueId();
      live.proxy.losses = Array<Loss>(1000).fill("break");
      const doubtful = live.clientOfProxy({ timeoutMs: 2000 }).claim(id, { token: "the-token-of-doubt" });
      await assert.rejects(doubtful, { name: "UnavailableError", applied: "unknown" });
      live.proxy.losses = [];
      const claim = await live.clientOfProxy().claim(id, { token: "the-token-of-doubt" });
      assert.equal(claim.replayed, true);
    });

    test("every id is claimed exactly once while the service is killed and restarted", async () => {
      const ids = Array.from({ length: 60 }, uniqueId);
      const winners = new Map<string, number>(ids.map((id) => [id, 0]));
      let duplicates = 0;
      let crash: Promise<void> | undefined;
      live.proxy.onLoss = () => void (crash ??= live.crash());
      const work = async (worker: number) => {
        const client = live.clientOfProxy();
        // Each worker starts at a different id, so the lost replies belong to winners.
        for (const id of [...ids.slice(worker * 15), ...ids.slice(0, worker * 15)]) {
          try {
            await client.claim(id, { ttlMs: 3_600_000 });
            winners.set(id, winners.get(id)! + 1);
          } catch (error) {
            assert.ok(error instanceof DuplicateTransactionError, String(error));
            duplicates += 1;
          }
          if (id === ids[5]) live.proxy.losses = ["break", "break", "break", "break"];
        }
      };
      await Promise.all([0, 1, 2, 3].map(work));
      assert.ok(crash !== undefined);
      await crash;
      assert.deepEqual([...new Set(winners.values())], [1]);
      assert.equal(duplicates, 3 * ids.length);
    });
  });
}
