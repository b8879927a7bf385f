import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { end, firstLine } from "./process.js";

/** A store for the claims of a service. */
export interface Store extends AsyncDisposable {
  url: string;
}

/** The stores that the suites run on. */
export const STORES: Record<string, () => Promise<Store>> = { sqlite: sqliteStore, redis: redisStore };

/** Create a folder, removed on disposal; its path is short enough for a Unix socket. */
export async function temporaryFolder(): Promise<{ path: string } & AsyncDisposable> {
  const path = await mkdtemp(join(tmpdir(), "dedup-"));
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) };
}

/** Create an embedded store in a new file. */
export async function sqliteStore(): Promise<Store> {
  const folder = await temporaryFolder();
  return { url: `sqlite:///${join(folder.path, "claims.db")}`, [Symbol.asyncDispose]: folder[Symbol.asyncDispose] };
}

/** Start a Redis on a Unix socket, which unlike a free port no other process can take first. */
export async function redisStore(): Promise<Store> {
  const folder = await temporaryFolder();
  const socket = join(folder.path, "redis.sock");
  const child = spawn("redis-server", ["--port", "0", "--unixsocket", socket, "--save", "", "--dir", folder.path], {
    stdio: ["ignore", "pipe", "ignore"],
  });
  const failed = new Promise<never>((_, reject) => child.once("error", reject));
  const ready = firstLine(child.stdout, (line) => (line.includes("ready to accept connections") ? true : undefined));
  await Promise.race([ready, failed]);
  return {
    url: `unix://${socket}`,
    async [Symbol.asyncDispose]() {
      await end(child, "SIGKILL");
      await folder[Symbol.asyncDispose]();
    },
  };
}
