import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { suite, test } from "node:test";
import { Client, DuplicateTransactionError, InvalidRequestError, PayloadMismatchError, ResultNotStoredError } from "../src/index.js";
import type { Claim } from "../src/index.js";
import { FakeClient, FakeService, type Policy } from "../src/testing.js";
import { PATIENT } from "./harness/live.js";
import { Service } from "./harness/service.js";
import { temporaryFolder } from "./harness/stores.js";

interface Rules {
  default_ttl_ms?: number;
  max_ttl_ms?: number;
  retention_ms?: number;
  shadow?: boolean;
}

interface Step {
  do: "claim" | "complete" | "extend" | "release";
  namespace?: string;
  id?: string;
  as?: string;
  claim?: string;
  ttl_ms?: number;
  fingerprint?: string;
  result_bytes?: number;
  expect: string;
  field?: string;
  lease_ms?: number;
  retained_ms?: number;
}

interface Scenario {
  name: string;
  allow_unknown_namespaces?: boolean;
  max_result_bytes?: number;
  namespaces: Record<string, Rules>;
  steps: Step[];
}

const vectors = JSON.parse(readFileSync(new URL("../../../golden/policies.json", import.meta.url), "utf8")) as {
  scenarios: Scenario[];
  invalid_policies: { why: string; policy: Rules }[];
};

function policyOf({ default_ttl_ms, max_ttl_ms, retention_ms, shadow }: Rules): Policy {
  return { defaultTtlMs: default_ttl_ms, maxTtlMs: max_ttl_ms, retentionMs: retention_ms, shadow };
}

/** Return the policy file of the service for a scenario. */
function policyFile({ allow_unknown_namespaces = true, namespaces }: Scenario): string {
  const tables = Object.entries(namespaces).map(([name, { shadow, ...rules }]) => {
    const lines = Object.entries(rules).map(([field, ms]) => `${field.replace(/_ms$/, "")} = "${ms}ms"\n`);
    return `[namespaces.${name}]\n${lines.join("")}${shadow ? 'mode = "shadow"\n' : ""}`;
  });
  return `allow_unknown_namespaces = ${allow_unknown_namespaces}\n${tables.join("")}`;
}

for (const scenario of vectors.scenarios) {
  const { max_result_bytes = 4096, allow_unknown_namespaces = true, namespaces, steps } = scenario;

  suite(`rules of namespaces: ${scenario.name}`, () => {
    test("the fake keeps them", async () => {
      const service = new FakeService();
      service.maxResultBytes = max_result_bytes;
      service.allowUnknownNamespaces = allow_unknown_namespaces;
      for (const [name, rules] of Object.entries(namespaces)) service.setPolicy(name, policyOf(rules));
      await play(new FakeClient(service), steps);
    });

    test("the service keeps them", async () => {
      await using folder = await temporaryFolder();
      const file = join(folder.path, "policy.toml");
      await writeFile(file, policyFile(scenario));
      const options = ["--policy-file", file, "--max-result-bytes", String(max_result_bytes)];
      await using service = await Service.start(`sqlite:///${join(folder.path, "claims.db")}`, "127.0.0.1:0", ...options);
      const client = new Client(service.address, PATIENT);
      await play(client, steps).finally(() => client.close());
    });
  });
}

for (const { why, policy } of vectors.invalid_policies) {
  test(`a policy that the service rejects throws: ${why}`, () => {
    assert.throws(() => new FakeService().setPolicy("pay", policyOf(policy)), RangeError);
  });
}

async function play(client: Client, steps: Step[]): Promise<void> {
  const claims = new Map<string, Claim>();
  for (const step of steps) {
    const happened = await played(client, claims, step).catch((error: unknown) => {
      if (error instanceof PayloadMismatchError) return "mismatch";
      if (error instanceof DuplicateTransactionError) return "duplicate";
      if (error instanceof ResultNotStoredError) return "invalid result";
      if (error instanceof InvalidRequestError) return `invalid ${error.violations.map(({ field }) => field).join(" ")}`;
      throw error;
    });
    assert.equal(happened, [step.expect, step.field].filter(Boolean).join(" "), JSON.stringify(step));
  }
}

/** Play one step, check its times, and return what happened. */
async function played(client: Client, claims: Map<string, Claim>, step: Step): Promise<string> {
  const { ttl_ms: ttlMs, namespace, fingerprint } = step;
  if (step.do === "claim") {
    const claim = await client.claim(step.id!, { namespace, ttlMs, fingerprint });
    claims.set(step.as ?? "", claim);
    if (claim.shadowDuplicate) return "shadow_duplicate";
    const { claimTime, expireTime } = claim.transaction!;
    return lasts("claimed", claimTime, expireTime, step.lease_ms);
  }
  const claim = claims.get(step.claim!)!;
  if (step.do === "complete") {
    await claim.complete("x".repeat(step.result_bytes ?? 0), { ttlMs });
    const held = await client.get(claim.transactionId, { namespace: claim.transaction!.namespace });
    return lasts("completed", held!.completionTime, held!.expireTime, step.retained_ms);
  }
  if (step.do === "extend") {
    await claim.extend(ttlMs);
    const { claimTime, expireTime } = claim.transaction!;
    return lasts("extended", claimTime, expireTime, step.lease_ms);
  }
  await claim.release();
  return "released";
}

/** Return what happened, once its lifetime is right. The service reads its clock once for the reply and once for the store. */
function lasts(happened: string, begin: Date | undefined, end: Date | undefined, ms: number | undefined): string {
  assert.ok(Math.abs(end!.getTime() - begin!.getTime() - ms!) < 60_000, `${happened} from ${begin} to ${end}`);
  return happened;
}
