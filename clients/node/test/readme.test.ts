import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFile, rm, writeFile } from "node:fs/promises";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import type express from "express";
import type { FastifyInstance } from "fastify";
import { DuplicateTransactionError, PayloadMismatchError, UnavailableError, type Client } from "../src/index.js";
import { until } from "./harness/live.js";
import { ScriptedService } from "./harness/scripted-service.js";
import { Service } from "./harness/service.js";
import { sqliteStore } from "./harness/stores.js";

const run = promisify(execFile);
const readme = await readFile(new URL("../../README.md", import.meta.url), "utf8");
const [example, expressGuard, fastifyGuard, servers, mapping, fake] = [...readme.matchAll(/^```js\n(.*?)^```$/gms)].map((match) => match[1]!);
const promised = /Run twice it prints\n\n```\n(.*?)^```$/ms.exec(readme)![1];

test("the README example prints what the README shows", async () => {
  await using store = await sqliteStore();
  await using service = await Service.start(store.url);
  // Longer timeouts than the example's, for a busy machine.
  const options = 'claimant: "lucky-box-api", timeoutMs: 60_000';
  const code = example!.replace("127.0.0.1:50051", service.address).replace('claimant: "lucky-box-api"', options);
  await using snippet = await written("readme-example.mjs", code);
  const printed = [];
  for (let time = 0; time < 2; time++) printed.push((await run(process.execPath, [snippet.path])).stdout);
  assert.equal(printed.join(""), promised);
});

test("the README code maps errors to the HTTP statuses of its table", async () => {
  await using snippet = await written("readme-mapping.mjs", mapping!);
  const { httpStatusOf } = (await import(snippet.path)) as { httpStatusOf(error: unknown): number };
  const of = (kind: { prototype: object }) => httpStatusOf(Object.create(kind.prototype));
  assert.deepEqual([DuplicateTransactionError, PayloadMismatchError, UnavailableError].map(of), [409, 422, 503]);
});

test("the README apps run a request once", async () => {
  await using store = await sqliteStore();
  await using service = await Service.start(store.url);
  const address = (code: string) => code.replace('"127.0.0.1:50051"', `"${service.address}", { timeoutMs: 60_000 }`);
  await using expressApp = await written("readme-express.mjs", address(expressGuard!));
  await using fastifyApp = await written("readme-fastify.mjs", address(fastifyGuard!));
  for (const { path } of [expressApp, fastifyApp]) {
    const { app } = (await import(path)) as { app: express.Express | FastifyInstance };
    const server = "ready" in app ? (await app.ready(), app.server) : createServer(app);
    await new Promise<void>((resolve) => void server.listen(0, "127.0.0.1", resolve));
    const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/pay`;
    const headers = { "content-type": "application/json", "idempotency-key": "k-1", "x-user": path };
    for (const replayed of [null, "true"]) {
      const response = await fetch(url, { method: "POST", headers, body: '{"amount": 5}' });
      assert.deepEqual([response.status, await response.json()], [201, { paid: 5 }]);
      assert.equal(response.headers.get("idempotency-replayed"), replayed);
    }
    server.closeAllConnections();
    server.close();
  }
});

test("the README code connects to several servers", async () => {
  using one = await ScriptedService.start({ outcome: 1 });
  using two = await ScriptedService.start({ outcome: 1 });
  await using snippet = await written("readme-servers.mjs", servers!);
  const { connect } = (await import(snippet.path)) as { connect(...addresses: string[]): Client };
  const client = connect(one.address, two.address);
  await until(async () => {
    await client.claim("order", { timeoutMs: 60_000 });
    return one.requests.length > 0 && two.requests.length > 0;
  });
  client.close();
});

test("the README test of your code passes", async () => {
  await using snippet = await written("readme-fake.mjs", fake!);
  await run(process.execPath, [snippet.path]);
});

/** Write a module inside the package, so it can import the package by name. */
async function written(name: string, code: string): Promise<{ path: string } & AsyncDisposable> {
  const path = fileURLToPath(new URL(`../${name}`, import.meta.url));
  await writeFile(path, code);
  return { path, [Symbol.asyncDispose]: () => rm(path) };
}
