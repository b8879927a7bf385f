// The work of the reward service, without HTTP: checks an order, pays it, and describes the response.

import { setTimeout as sleep } from "node:timers/promises";

const DEFAULT_SECONDS = 3;
const LARGE_BYTES = 10_000;

/**
 * Pay the reward of an order, and return the response. `signal` aborts when the claim is lost; ../README.md describes
 * `simulate`.
 */
export async function pay(ledger, name, key, order, signal) {
  const { unit = "", amount, simulate, seconds = DEFAULT_SECONDS } = order ?? {};
  // Nothing was paid: the guard releases the key after a 4xx, and the caller may correct the order under it.
  if (!Number.isInteger(amount) || amount <= 0) return problem(400, "amount is not a whole number above 0");
  if (simulate === "slow") await sleep(seconds * 1000, undefined, { signal });
  // Another process may pay after the claim was lost. An exception keeps the key.
  signal?.throwIfAborted();
  const id = await ledger.pay({ key: key.replaceAll('"', ""), unit, amount, paidBy: name });
  // Paid, but not answered: the guard keeps the key after a 5xx.
  if (simulate === "error") return problem(500, "the reward was paid, and then the service failed");
  return {
    status: 201,
    headers: {
      "Content-Type": "application/json",
      Location: `/rewards/${id}`,
      ETag: `"reward-${id}"`,
      // Belongs to one caller: the guard never stores it.
      "Set-Cookie": `served_by=${name}; Path=/`,
    },
    body: { id, unit, amount, ...(simulate === "large" && { padding: "x".repeat(LARGE_BYTES) }) },
  };
}

/** Return a problem document (RFC 9457). */
function problem(status, title) {
  const body = { type: "about:blank", title, status };
  return { status, headers: { "Content-Type": "application/problem+json" }, body };
}
