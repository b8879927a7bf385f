import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { cp, mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { temporaryFolder } from "./harness/stores.js";

const run = promisify(execFile);
const PACKAGE = fileURLToPath(new URL("../../", import.meta.url));

test("npm install of the folder of a fresh clone builds the package", async () => {
  await using folder = await temporaryFolder();
  const clone = join(folder.path, "clone");
  // The installed compiler is copied too, so the test needs no network.
  const filter = (path: string) => path !== join(PACKAGE, "dist");
  await cp(PACKAGE, clone, { recursive: true, verbatimSymlinks: true, filter });
  const app = join(folder.path, "app");
  await mkdir(app);
  await writeFile(join(app, "package.json"), '{"private": true, "type": "module"}');
  const names = ["dedup-client", "dedup-client/express", "dedup-client/fastify", "dedup-client/testing"];
  const exported = `const names = ${JSON.stringify(names)};
    for (const name of names) console.log(Object.keys(await import(name)).length > 0);`;
  await writeFile(join(app, "app.js"), exported);
  await run("npm", ["install", "--offline", "--no-audit", "--no-fund", clone], { cwd: app });
  assert.equal((await run(process.execPath, ["app.js"], { cwd: app })).stdout, "true\n".repeat(names.length));
});
