import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { end, firstLine } from "./process.js";

/** A store that a service may keep its claims in. */
export interface Store extends AsyncDisposable {
  url: string;
}

/** What every promise is shown on. */
export const STORES: Record<string, () => Promise<Store>> = { sqlite: sqliteStore, redis: redisStore };

/** Makes a folder that goes with its user; its path is short, as those of Unix sockets must be. */
export async function temporaryFolder(): Promise<{ path: string } & AsyncDisposable> {
  const path = await mkdtemp(join(tmpdir(), "dedup-"));
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) };
}

/** Makes an embedded store in a new file. */
export async function sqliteStore(): Promise<Store> {
  const folder = await temporaryFolder();
  return { url: `sqlite:///${join(folder.path, "claims.db")}`, [Symbol.asyncDispose]: folder[Symbol.asyncDispose] };
}

/** Starts a Redis of its own, on a Unix socket: nobody else can take that between the choice and the start. */
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
