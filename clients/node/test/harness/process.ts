import { once } from "node:events";
import type { ChildProcess } from "node:child_process";
import { createInterface } from "node:readline";
import type { Readable } from "node:stream";

/** Return the first defined result of `find` over the lines; throws if the stream ends first. */
export async function firstLine<T>(stream: Readable, find: (line: string) => T | undefined): Promise<T> {
  const seen: string[] = [];
  return new Promise((resolve, reject) => {
    const lines = createInterface(stream);
    lines.on("line", (line) => {
      seen.push(line);
      const found = find(line);
      // Reading continues, because a full pipe would block the process.
      if (found !== undefined) resolve(found);
    });
    lines.on("close", () => reject(new Error(`the process ended before it was ready:\n${seen.join("\n")}`)));
  });
}

/** Signal a process and wait until it exits. */
export async function end(child: ChildProcess, signal: NodeJS.Signals): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const gone = once(child, "exit");
  child.kill(signal);
  await gone;
}
