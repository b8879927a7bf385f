// The reward service with Fastify. ../README.md describes its environment.

import Fastify from "fastify";
import { Client } from "dedup-client";
import { claimOf, idempotency } from "dedup-client/fastify";
import { openLedger } from "./ledger.js";
import { pay } from "./rewards.js";

const { DEDUP_TARGET = "127.0.0.1:50051", PORT = "0", DATABASE_URL, NAME = "rewards-fastify", CLAIM_TTL } = process.env;
const ledger = await openLedger(DATABASE_URL);
const client = new Client(DEDUP_TARGET, { claimant: NAME });
const ttlMs = CLAIM_TTL === undefined ? undefined : Number(CLAIM_TTL) * 1000;

const app = Fastify();
// With several users, also set `caller`: it keeps their keys and responses apart.
await app.register(idempotency, { client, ttlMs });
app.post("/rewards", async (request, reply) => {
  const { status, headers, body } = await pay(
    ledger,
    NAME,
    request.headers["idempotency-key"] ?? "",
    request.body,
    claimOf(request)?.signal,
  );
  return reply.code(status).headers(headers).send(body);
});
app.get("/rewards", () => ledger.paid());
app.addHook("onClose", async () => {
  client.close();
  await ledger.close();
});

await app.listen({ port: Number(PORT), host: "127.0.0.1" });
console.log(`listening on 127.0.0.1:${app.server.address().port}`);
// Finishes the requests in progress.
process.once("SIGTERM", () => app.close());
