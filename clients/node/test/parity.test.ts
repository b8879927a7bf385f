import assert from "node:assert/strict";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { test } from "node:test";
import { inspect } from "node:util";
import { Metadata, status } from "@grpc/grpc-js";
import express from "express";
import fastify from "fastify";
import { Channel } from "../src/channel.js";
import { idempotency as expressIdempotency } from "../src/express.js";
import { claimOf, idempotency as fastifyIdempotency } from "../src/fastify.js";
import { Client, ClientClosedError, DuplicateTransactionError } from "../src/index.js";
import { FakeClient, FakeService } from "../src/testing.js";
import { Live, PATIENT, uniqueId, until } from "./harness/live.js";
import { CLAIMED, ManualTransport } from "./harness/manual-transport.js";
import { ScriptedService } from "./harness/scripted-service.js";

test("metadata of a claim is sent with each of its calls", async () => {
  const transport = new ManualTransport();
  const client = new Client(new Channel(transport), PATIENT);
  const metadata = new Metadata();
  const claiming = client.claim("a", { metadata });
  transport.calls[0]!.answer(CLAIMED);
  const claim = await claiming;
  void claim.extend(60_000).catch(() => undefined);
  void claim.complete().catch(() => undefined);
  void claim.release().catch(() => undefined);
  assert.deepEqual(transport.calls.map(({ options }) => options.metadata === metadata), [true, true, true, true]);
});

test("a refused connection certainly changed nothing", async () => {
  for (const config of [[{ pick_first: {} }], [{ round_robin: {} }]]) {
    const channelOptions = { "grpc.service_config": JSON.stringify({ loadBalancingConfig: config }) };
    const client = new Client("127.0.0.1:1", { timeoutMs: 300, channelOptions });
    await assert.rejects(client.claim("order"), { name: "UnavailableError", applied: "no" });
    client.close();
  }
});

test("a claim in doubt with a token of the caller is left to the caller", async () => {
  const client = new FakeClient();
  client.service.loseReplies(1000);
  await assert.rejects(client.claim("a"), { applied: "unknown" });
  await assert.rejects(client.claim("b", { token: "the-token-of-doubt" }), { applied: "unknown" });
  client.service.loseReplies(0);
  const released = client.service.calls.filter(({ method }) => method === "ReleaseTransaction");
  assert.deepEqual(new Set(released.map(({ request }) => (request as { transactionId: string }).transactionId)), new Set(["a"]));
  assert.equal((await client.claim("b", { token: "the-token-of-doubt" })).replayed, true);
});

test("a closed client stays closed, and says so", async () => {
  const transport = new ManualTransport();
  const client = new Client("127.0.0.1:1", { timeoutMs: 60_000 });
  const pending = client.claim("order");
  client.close();
  await assert.rejects(pending, ClientClosedError);
  await assert.rejects(client.claim("order"), /the client is closed: create another one/);
  await assert.rejects(client.get("order"), ClientClosedError);
  assert.equal(transport.calls.length, 0);
  const fake = new FakeClient(undefined, { onUnavailable: "allow" });
  const claim = await fake.claim("order");
  fake.close();
  fake.close();
  for (const call of [fake.claim("b"), fake.get("order"), claim.complete(), claim.release(), claim.extend()]) {
    await assert.rejects(call, ClientClosedError);
  }
});

test("calls in flight end when their client is closed", async () => {
  await using live = await Live.over("sqlite");
  const client = live.client();
  const id = uniqueId();
  await client.claim(id);
  const waiting = client.claim(id, { waitMs: 60_000 });
  await until(() => live.client().get(id).then(Boolean));
  client.close();
  await assert.rejects(waiting, ClientClosedError);
});

test("nothing printed of a claim, an error or a client shows a token", async () => {
  const client = new FakeClient();
  const claim = await client.claim("order", { token: "a-very-secret-token", keepAlive: true });
  const duplicate: unknown = await client.claim("order").catch((error: unknown) => error);
  client.service.loseReplies(1000);
  const doubt: unknown = await claim.extend(60_000).catch((error: unknown) => error);
  client.service.loseReplies(0);
  await client.service.advance(1);
  await claim.release();
  const gone: unknown = await claim.complete().catch((error: unknown) => error);
  const real = new Client("127.0.0.1:1");
  for (const value of [claim, duplicate, doubt, gone, real]) {
    const texts = [inspect(value, { depth: Infinity, showHidden: true }), JSON.stringify(value), String(value)];
    for (const text of texts) assert.ok(!text.includes("secret"), text);
  }
  real.close();
  assert.match(inspect(claim), /^Claim \{\n? +transactionId: 'order'/);
  assert.equal(claim.token, "a-very-secret-token");
});

test("calls are spread over two servers, and go on when one ends", async () => {
  using one = await ScriptedService.start(CLAIMED);
  using two = await ScriptedService.start(CLAIMED);
  const client = new Client(`ipv4:${one.address},${two.address}`, PATIENT);
  try {
    // Both connections are made after some calls.
    for (let left = 500; left > 0 && (one.requests.length === 0 || two.requests.length === 0); left--) await client.claim("order");
    const [before, also] = [one.requests.length, two.requests.length];
    for (let call = 0; call < 20; call++) await client.claim("order");
    assert.deepEqual([one.requests.length - before, two.requests.length - also], [10, 10]);
    one[Symbol.dispose]();
    for (let call = 0; call < 20; call++) await client.claim("order");
    assert.ok(two.requests.length >= also + 30);
  } finally {
    client.close();
  }
});

test("a fake decides, replays and expires as the service does", async () => {
  const service = new FakeService();
  const [anna, bob] = [new FakeClient(service, { claimant: "anna" }), new FakeClient(service)];
  service.loseReplies();
  const claim = await anna.claim("order", { ttlMs: 10_000, fingerprint: "5" });
  assert.equal(claim.replayed, true);
  await assert.rejects(bob.claim("order"), (error: DuplicateTransactionError) => error.holder.claimant === "anna");
  await assert.rejects(bob.claim("order", { fingerprint: "6" }), { name: "PayloadMismatchError" });
  await service.advance(9_999);
  await claim.extend(10_000);
  await service.advance(9_999);
  assert.equal((await bob.get("order"))!.state, "in progress");
  await service.advance(1);
  assert.equal(await bob.get("order"), undefined);
  await assert.rejects(claim.complete(), { name: "NotHeldError" });
  const second = await bob.claim("order");
  await second.complete("paid 5");
  await second.complete("paid 5");
  await assert.rejects(second.complete("paid 6"), { name: "NotHeldError" });
  await assert.rejects(second.extend(), { name: "NotHeldError" });
  await service.advance(86_400_000);
  assert.equal(await bob.get("order"), undefined);
  assert.deepEqual(new Set(service.calls.map(({ method }) => method)).size, 4);
});

test("a fake rejects what the service rejects", async () => {
  const client = new FakeClient();
  const rejected = async (call: Promise<unknown>, field: string) =>
    assert.rejects(call, ({ violations }: { violations: { field: string }[] }) => violations[0]?.field === field);
  await rejected(client.claim(""), "transaction_id");
  await rejected(client.claim("a\u0001"), "transaction_id");
  await rejected(client.claim("a", { namespace: "NO" }), "namespace");
  await rejected(client.claim("a", { ttlMs: 0 }), "ttl");
  await rejected(client.claim("a", { expireTime: new Date(0) }), "expire_time");
  await rejected(client.claim("a", { token: "short" }), "claim_token");
  await rejected(client.claim("a", { fingerprint: "x".repeat(65) }), "payload_fingerprint");
  await rejected(client.claim("a", { claimant: "x".repeat(257) }), "claimant");
  await rejected(client.claim("a", { waitMs: 300_001 }), "wait");
  await assert.rejects((await client.claim("a")).complete("x".repeat(4097)), { name: "ResultNotStoredError" });
  client.service.unavailable = true;
  await assert.rejects(client.claim("b"), { name: "UnavailableError", reason: "STORE_UNREACHABLE", applied: "no" });
});

test("options of the guards are typed by the request of their framework", async () => {
  interface User extends express.Request {
    user?: { id: string };
  }
  const client = new FakeClient();
  const app = express();
  app.use(expressIdempotency<User>(client, { caller: (request) => request.user?.id ?? request.get("x-user") ?? "" }));
  app.use(expressIdempotency(client, { caller: (request: express.Request) => request.ip ?? "" }), express.json());
  const server = createServer(app);
  server.listen(0);
  assert.ok((server.address() as AddressInfo).port);
  server.close();
});

test("injected requests of Fastify are guarded, and keep the headers of earlier hooks", async () => {
  const client = new FakeClient();
  const app = fastify();
  app.addHook("onRequest", async (_, reply) => void reply.header("access-control-allow-origin", "*"));
  await app.register(fastifyIdempotency, { client, caller: (request) => String(request.headers["x-user"]) });
  app.post<{ Body: { amount: number } }>("/pay", async (request) => ({ paid: request.body.amount, lost: claimOf(request)!.lost }));
  const send = () =>
    app.inject({ method: "POST", url: "/pay", headers: { "idempotency-key": "k-1", "x-user": "anna" }, payload: { amount: 5 } });
  const [first, again] = [await send(), await send()];
  assert.deepEqual([first.json(), again.json()], [{ paid: 5, lost: false }, { paid: 5, lost: false }]);
  assert.deepEqual([again.headers["idempotency-replayed"], again.headers["access-control-allow-origin"]], ["true", "*"]);
  assert.ok(await client.get("http:anna:POST:/pay:k-1"));
  await app.close();
});

test("a request whose client disconnects before it is admitted is not run, and its claim is released", async () => {
  const transport = new ManualTransport();
  const client = new Client(new Channel(transport), PATIENT);
  const app = express();
  app.use(expressIdempotency(client, { waitMs: 60_000 }), () => assert.fail("it ran"));
  const server = createServer(app);
  await new Promise<void>((resolve) => void server.listen(0, "127.0.0.1", resolve));
  const controller = new AbortController();
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/pay`;
  const headers = { "idempotency-key": "k-1" };
  const request = fetch(url, { method: "POST", headers, signal: controller.signal });
  await until(() => transport.calls.length === 1);
  controller.abort();
  await assert.rejects(request);
  await until(() => transport.calls.length === 2);
  assert.deepEqual(transport.calls.map(({ method }) => method), ["ClaimTransaction", "ReleaseTransaction"]);
  transport.calls[1]!.answer({ outcome: 1 });
  server.closeAllConnections();
  server.close();
});

test("a body that was read before the guard needs rawBody", async () => {
  const client = new FakeClient();
  for (const [verify, code] of [
    [undefined, 500],
    [(req: object, _: unknown, body: Buffer) => void Object.assign(req, { rawBody: body }), 200],
  ] as const) {
    const app = express();
    app.set("env", "test");
    app.use(express.json(verify && { verify }), expressIdempotency(client));
    app.post("/pay", (req, res) => void res.json(req.body));
    const server = createServer(app);
    await new Promise<void>((resolve) => void server.listen(0, "127.0.0.1", resolve));
    const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/pay`;
    const headers = { "content-type": "application/json", "idempotency-key": "k-1" };
    assert.equal((await fetch(url, { method: "POST", headers, body: "{}" })).status, code);
    server.closeAllConnections();
    server.close();
  }
});
