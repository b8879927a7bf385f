import { once } from "node:events";
import type { ChildProcess } from "node:child_process";
import { createInterface } from "node:readline";
import type { Readable } from "node:stream";

/** Returns what `find` makes of the first line for which it is not undefined; throws when the lines end before. */
export async function firstLine<T>(stream: Readable, find: (line: string) => T | undefined): Promise<T> {
  const seen: string[] = [];
  return new Promise((resolve, reject) => {
    const lines = createInterface(stream);
    lines.on("line", (line) => {
      seen.push(line);
      const found = find(line);
      // The lines are read on: a full pipe would stop the process.
      if (found !== undefined) resolve(found);
    });
    lines.on("close", () => reject(new Error(`the process ended before it was ready:\n${seen.join("\n")}`)));
  });
}

/** Ends a process and waits until it has gone. */
export async function end(child: ChildProcess, signal: NodeJS.Signals): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const gone = once(child, "exit");
  child.kill(signal);
  await gone;
}
