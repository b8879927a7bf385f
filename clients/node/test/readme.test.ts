import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { readFile, rm, writeFile } from "node:fs/promises";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { DuplicateTransactionError, PayloadMismatchError, UnavailableError } from "../src/index.js";
import { Service } from "./harness/service.js";
import { sqliteStore } from "./harness/stores.js";

const run = promisify(execFile);
const readme = await readFile(new URL("../../README.md", import.meta.url), "utf8");
const [example, mapping] = [...readme.matchAll(/^```js\n(.*?)^```$/gms)].map((match) => match[1]!);
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

/** Write a module inside the package, so it can import the package by name. */
async function written(name: string, code: string): Promise<{ path: string } & AsyncDisposable> {
  const path = fileURLToPath(new URL(`../${name}`, import.meta.url));
  await writeFile(path, code);
  return { path, [Symbol.asyncDispose]: () => rm(path) };
}
