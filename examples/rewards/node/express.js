// The reward service with Express. ../README.md describes its environment.

import express from "express";
import { Client } from "dedup-client";
import { claimOf, idempotency } from "dedup-client/express";
import { openLedger } from "./ledger.js";
import { pay } from "./rewards.js";

const { DEDUP_TARGET = "127.0.0.1:50051", PORT = "0", DATABASE_URL, NAME = "rewards-express", CLAIM_TTL } = process.env;
const ledger = await openLedger(DATABASE_URL);
const client = new Client(DEDUP_TARGET, { claimant: NAME });
const ttlMs = CLAIM_TTL === undefined ? undefined : Number(CLAIM_TTL) * 1000;

const app = express();
// Before the body parser. With several users, also set `caller`: it keeps their keys and responses apart.
app.use(idempotency(client, { ttlMs }), express.json());
app.post("/rewards", async (req, res) => {
  const { status, headers, body } = await pay(
    ledger,
    NAME,
    req.get("Idempotency-Key") ?? "",
    req.body,
    claimOf(req)?.signal,
  );
  res.status(status).set(headers).json(body);
});
app.get("/rewards", async (_, res) => res.json(await ledger.paid()));

const server = app.listen(Number(PORT), "127.0.0.1", () => {
  console.log(`listening on 127.0.0.1:${server.address().port}`);
});
// Finishes the requests in progress.
process.once("SIGTERM", () =>
  server.close(async () => {
    client.close();
    await ledger.close();
  }),
);
