import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { status, type ServiceError } from "@grpc/grpc-js";
import { Client, DuplicateTransactionError, UnavailableError, type ClientOptions } from "../src/index.js";
import { ClaimOutcome } from "../src/gen/dedup/v1/dedup.js";
import { ScriptedService, type Refusal, type Scripted } from "./harness/scripted-service.js";

interface Vectors {
  errors: { reasons: { code: keyof typeof status; reason: string; applied: string; retry_info: boolean }[] };
}

const vectors = JSON.parse(readFileSync(new URL("../../../golden_vectors.json", import.meta.url), "utf8")) as Vectors;
const CLAIMED = { outcome: ClaimOutcome.CLAIM_OUTCOME_CLAIMED };
const AWAY: Refusal = { code: status.UNAVAILABLE, reason: "STORE_UNREACHABLE", retryAfterMs: 1 };
// No attempt may time out, however slow the machine is.
const PATIENT = { timeoutMs: 60_000, attemptTimeoutMs: 60_000 };

async function against(
  answers: Scripted[],
  options: ClientOptions,
  run: (client: Client, service: ScriptedService) => Promise<void>,
): Promise<void> {
  using service = await ScriptedService.start(...answers);
  const client = new Client(service.address, { ...PATIENT, ...options });
  try {
    await run(client, service);
  } finally {
    client.close();
  }
}

for (const outcome of [ClaimOutcome.CLAIM_OUTCOME_UNSPECIFIED, 99 as ClaimOutcome]) {
  for (const onUnavailable of ["deny", "allow"] as const) {
    test(`an unknown outcome is never a grant: ${outcome}, ${onUnavailable}`, () =>
      against([{ outcome }], { onUnavailable }, async (client, service) => {
        const expected = { name: "UnavailableError", reason: "OUTCOME_UNSPECIFIED", applied: "unknown" };
        await assert.rejects(client.claim("order"), expected);
        await assert.rejects(
          client.once("order", {}, () => assert.fail("the work began")),
          expected,
        );
        assert.equal(service.requests.length, 2);
      }));
  }
}

test("all attempts of a call send one token, and each call has its own", () =>
  against([AWAY, { code: status.RESOURCE_EXHAUSTED }, AWAY, CLAIMED], {}, async (client, service) => {
    const first = await client.claim("order");
    assert.equal(service.requests.length, 4);
    const tokens = new Set(service.requests.map((request) => request.claimToken));
    assert.deepEqual([...tokens], [first.token]);
    assert.match(first.token, /^[A-Za-z0-9_-]{22}$/);
    const second = await client.claim("order");
    assert.notEqual(second.token, first.token);
  }));

test("the caller's token is sent unchanged", () =>
  against([AWAY, CLAIMED], {}, async (client, service) => {
    await client.claim("order", { token: "the-token-of-before" });
    assert.deepEqual(
      service.requests.map((request) => request.claimToken),
      ["the-token-of-before", "the-token-of-before"],
    );
    await assert.rejects(client.claim("order", { token: "" }), { name: "InvalidRequestError" });
  }));

test("an attempt that timed out is retried with the same token", () =>
  against([{ code: status.DEADLINE_EXCEEDED }, CLAIMED], {}, async (client, service) => {
    await client.claim("order");
    assert.equal(service.requests.length, 2);
    assert.equal(service.requests[0]?.claimToken, service.requests[1]?.claimToken);
  }));

test("by default an unavailable service is an error with details", () =>
  against([{ ...AWAY, retryAfterMs: 3_600_000 }], {}, async (client, service) => {
    await assert.rejects(client.claim("order"), {
      name: "UnavailableError",
      code: status.UNAVAILABLE,
      reason: "STORE_UNREACHABLE",
      applied: "no",
      retryAfterMs: 3_600_000,
    });
    assert.equal(service.requests.length, 1);
  }));

test('with "allow" the grant is marked and logged, and holds nothing', async () => {
  const warnings: [string, object][] = [];
  const logger = { warn: (message: string, details: object) => void warnings.push([message, details]) };
  await against([{ ...AWAY, retryAfterMs: 3_600_000 }], { onUnavailable: "allow", logger }, async (client, service) => {
    const claim = await client.claim("order");
    assert.equal(claim.failOpen, true);
    assert.equal(claim.replayed, false);
    await claim.extend(60_000);
    await claim.complete("done");
    await claim.release();
    assert.equal(service.requests.length, 1);
    const details = { transaction: "3eeb7e96e59ce40f", code: status.UNAVAILABLE, reason: "STORE_UNREACHABLE", applied: "no" };
    assert.deepEqual(warnings, [["dedup service unavailable: proceeding without a claim", details]]);
    await assert.rejects(client.claim("order", { onUnavailable: "deny" }), UnavailableError);
  });
});

test('"allow" does not grant a duplicate', () =>
  against([{ outcome: ClaimOutcome.CLAIM_OUTCOME_DUPLICATE }], { onUnavailable: "allow" }, async (client) => {
    await assert.rejects(client.claim("order"), DuplicateTransactionError);
  }));

for (const refusal of [
  { code: status.FAILED_PRECONDITION, reason: "VALUE_VERSION_UNKNOWN" },
  { code: status.INTERNAL, reason: "INTERNAL", applied: "unknown" },
  { code: status.PERMISSION_DENIED },
]) {
  test(`"allow" does not apply to a refusal: ${status[refusal.code]}`, () =>
    against([refusal], { onUnavailable: "allow" }, async (client) => {
      await assert.rejects(client.claim("order"), { name: "UnavailableError", code: refusal.code });
    }));
}

test("a call that failed in gRPC itself may have been applied", () =>
  against([{ code: status.UNIMPLEMENTED }], {}, async (client) => {
    await assert.rejects(client.claim("order"), { name: "UnavailableError", reason: "", applied: "unknown" });
  }));

test("the cause of an error has the correlation id", () =>
  against([{ code: status.INTERNAL, reason: "INTERNAL", correlationId: "click-4711" }], {}, async (client) => {
    await assert.rejects(client.claim("order"), ({ cause }: { cause: ServiceError }) => {
      assert.equal(cause.metadata.get("x-correlation-id")[0], "click-4711");
      return true;
    });
  }));

test("a shadow duplicate proceeds and holds nothing", () =>
  against([{ ...CLAIMED, shadowDuplicate: true }], {}, async (client, service) => {
    const claim = await client.claim("order");
    assert.equal(claim.shadowDuplicate, true);
    await claim.complete();
    assert.equal(service.requests.length, 1);
  }));

test("a signal ends the call with its reason, also with \"allow\"", () =>
  against([AWAY], { onUnavailable: "allow" }, async (client) => {
    await assert.rejects(client.claim("order", { signal: AbortSignal.abort(new Error("gone home")) }), /gone home/);
  }));

test("invalid options are rejected before a request is sent", () =>
  against([CLAIMED], {}, async (client, service) => {
    for (const options of [
      { ttlMs: 0.5 },
      { ttlMs: NaN },
      { waitMs: -1 },
      { ttlMs: 1, expireTime: new Date() },
      { expireTime: new Date("never") },
      { claimant: "\ud800" },
    ]) {
      await assert.rejects(client.claim("order", options), { name: "InvalidRequestError" });
    }
    await assert.rejects(client.claim("\ud800"), { name: "InvalidRequestError" });
    await assert.rejects(client.claim("order", { timeoutMs: Infinity }), RangeError);
    assert.equal(service.requests.length, 0);
  }));

for (const { code, reason, applied, retry_info } of vectors.errors.reasons) {
  const error = { code: status[code] as status, reason, applied };

  test(`an error is decoded as in every client: ${reason}`, () =>
    // A delay beyond the budget ends the call after the first answer.
    against([{ ...error, retryAfterMs: 3_600_000 }], {}, async (client) => {
      const expected = code === "INVALID_ARGUMENT" ? { name: "InvalidRequestError" } : error;
      await assert.rejects(client.claim("order"), expected);
    }));

  const again = retry_info || code === "DEADLINE_EXCEEDED";
  test(`an error is ${again ? "retried" : "not retried"}: ${reason}`, () =>
    against([retry_info ? { ...error, retryAfterMs: 1 } : error, CLAIMED], {}, async (client, service) => {
      await client.claim("order").catch(() => undefined);
      assert.equal(service.requests.length, again ? 2 : 1);
    }));
}
