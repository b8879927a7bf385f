import { spawn, type ChildProcess } from "node:child_process";
import { fileURLToPath } from "node:url";
import { end, firstLine } from "./process.js";

const PACKAGE = fileURLToPath(new URL("../../../", import.meta.url));
const PYTHON = process.env["DEDUP_TEST_PYTHON"] ?? "../../.venv/bin/python";

/** The dedup service in its own process. */
export class Service implements AsyncDisposable {
  private constructor(
    private readonly child: ChildProcess,
    /** The target for a client. */
    readonly address: string,
    /** The log so far, one object per line. */
    readonly log: Record<string, unknown>[],
  ) {}

  /** Start the service and wait until it listens. */
  static async start(storeUrl: string, listen = "127.0.0.1:0", ...options: string[]): Promise<Service> {
    // The service reads every DEDUP_ variable as a setting and rejects unknown ones.
    const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith("DEDUP_")));
    const child = spawn(PYTHON, ["-m", "dedup_service", "serve", "--listen", listen, "--store-url", storeUrl, ...options], {
      cwd: PACKAGE,
      env,
      stdio: ["ignore", "ignore", "pipe"],
    });
    const log: Record<string, unknown>[] = [];
    const failed = new Promise<never>((_, reject) => child.once("error", reject));
    const serving = firstLine(child.stderr, (line) => {
      const entry = parse(line);
      log.push(entry);
      return entry["event"] === "server_started" ? (entry["addresses"] as string[])[0] : undefined;
    });
    return new Service(child, await Promise.race([serving, failed]), log);
  }

  /** Kill the service without a shutdown, as a crash would. */
  kill(): Promise<void> {
    return end(this.child, "SIGKILL");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await end(this.child, "SIGKILL");
  }
}

function parse(line: string): Record<string, unknown> {
  try {
    return JSON.parse(line) as Record<string, unknown>;
  } catch {
    return { text: line };
  }
}
