import type { OutgoingHttpHeaders, ServerResponse } from "node:http";
import type { Header, Recorded } from "./stored.js";

type Callback = (error?: Error | null) => void;

/** A response as its guard sees it. */
export interface Watcher {
  /** Called when the application ends its response; the last byte is sent after the promise. It must not reject. */
  ended(response: Recorded): Promise<void>;
  /** Called if the connection closes after the response began and before it ended. */
  cut(): void;
}

/**
 * Hold back the response of the application until it ends, or until it is streamed.
 *
 * A response is streamed after `flushHeaders`, as an event stream, or once its body has more than `limit` bytes.
 */
export function holdBack(res: ServerResponse, limit: number, watcher: Watcher): void {
  const { writeHead, write, end, flushHeaders } = res;
  let phase: "held" | "streaming" | "ending" | "open" = "held";
  let begun = false;
  let held: Buffer[] = [];
  let size = 0;

  const begin = () => {
    // The listeners of other middleware on writeHead may set headers.
    if (!begun) res.writeHead(res.statusCode);
  };

  const stream = () => {
    phase = "streaming";
    const first = held;
    held = [];
    size = 0;
    writeHead.call(res, res.statusCode);
    for (const chunk of first) pass(chunk);
  };

  /** Send a part of a streamed response, but not the last bytes of a declared length. */
  const pass = (chunk: Buffer, callback?: Callback): boolean => {
    size += chunk.length;
    if (size < Number(res.getHeader("content-length") ?? Infinity)) return write.call(res, chunk, "utf8", callback ?? ignore);
    held.push(chunk);
    if (callback) process.nextTick(callback);
    return true;
  };

  const finish = async (callback: Callback | undefined): Promise<void> => {
    const streamed = phase === "streaming";
    const status = res.statusCode;
    const body = Buffer.concat(held);
    phase = "ending";
    await watcher.ended({ status, headers: headersOf(res), body, streamed });
    phase = "open";
    forget(res, "headersSent", "writableEnded");
    if (!streamed) res.statusCode = status;
    end.call(res, body.length > 0 ? body : undefined, "utf8", callback ?? ignore);
  };

  res.writeHead = function (status: number, ...rest: unknown[]) {
    if (phase === "streaming" || phase === "open") return (writeHead as (...args: unknown[]) => ServerResponse).call(res, status, ...rest);
    if (begun) throw Object.assign(new Error("Cannot write headers after they are sent"), { code: "ERR_HTTP_HEADERS_SENT" });
    setHead(res, status, rest);
    begun = true;
    if (/^\s*text\/event-stream\s*(;|$)/i.test(String(res.getHeader("content-type")))) stream();
    return res;
  };

  res.write = function (chunk: unknown, ...rest: unknown[]) {
    const [encoding, callback] = argumentsOf(rest);
    if (phase === "open") return write.call(res, chunk, encoding ?? "utf8", callback ?? ignore);
    if (phase === "ending") {
      if (callback) process.nextTick(callback, Object.assign(new Error("write after end"), { code: "ERR_STREAM_WRITE_AFTER_END" }));
      return false;
    }
    begin();
    const bytes = bytesOf(chunk, encoding);
    if (isStreaming()) return pass(bytes, callback);
    held.push(bytes);
    size += bytes.length;
    if (callback) process.nextTick(callback);
    if (size > limit) stream();
    return true;
  };

  res.end = function (...args: unknown[]) {
    const chunk = typeof args[0] === "function" ? undefined : args.shift();
    const [encoding, callback] = argumentsOf(args);
    if (phase === "open") return end.call(res, chunk, encoding ?? "utf8", callback ?? ignore);
    if (phase === "ending") return res;
    begin();
    if (chunk !== undefined && chunk !== null) held.push(bytesOf(chunk, encoding));
    shadow(res, "writableEnded", () => true);
    void finish(callback);
    return res;
  };

  res.flushHeaders = function () {
    if (phase === "held") {
      begin();
      if (!isStreaming()) stream();
    }
    if (phase !== "ending") flushHeaders.call(res);
  };

  // A function, since TypeScript does not see that other functions change the phase.
  const isStreaming = () => phase === "streaming";
  shadow(res, "headersSent", (real) => begun || real);
  res.once("close", () => {
    if (begun && (phase === "held" || phase === "streaming")) watcher.cut();
  });
}

function ignore(): void {}

/** Make a property of a response answer as if nothing were held back. */
function shadow(res: ServerResponse, name: "headersSent" | "writableEnded", get: (real: boolean) => boolean): void {
  const prototype = Object.getPrototypeOf(res) as object;
  const real = () => Boolean(Reflect.get(prototype, name, res));
  Object.defineProperty(res, name, { configurable: true, get: () => get(real()) });
}

function forget(res: ServerResponse, ...names: string[]): void {
  for (const name of names) Reflect.deleteProperty(res, name);
}

/** Apply the arguments of writeHead, as Node does. */
function setHead(res: ServerResponse, status: number, rest: unknown[]): void {
  res.statusCode = status;
  if (typeof rest[0] === "string") res.statusMessage = rest.shift() as string;
  const headers = rest[0] as OutgoingHttpHeaders | unknown[] | undefined;
  if (Array.isArray(headers)) {
    const flat = headers.flat() as string[];
    const pairs = Array.from({ length: flat.length / 2 }, (_, index) => [flat[2 * index]!, flat[2 * index + 1]!] as const);
    for (const [name] of pairs) res.removeHeader(name);
    for (const [name, value] of pairs) res.appendHeader(name, value);
  } else {
    for (const [name, value] of Object.entries(headers ?? {})) if (value !== undefined) res.setHeader(name, value);
  }
}

function headersOf(res: ServerResponse): Header[] {
  return Object.entries(res.getHeaders()).flatMap(([name, value]) =>
    [value].flat().map((one): Header => [name, String(one)]),
  );
}

function argumentsOf(rest: unknown[]): [BufferEncoding | undefined, Callback | undefined] {
  const encoding = typeof rest[0] === "string" ? (rest[0] as BufferEncoding) : undefined;
  return [encoding, rest.find((argument) => typeof argument === "function") as Callback | undefined];
}

function bytesOf(chunk: unknown, encoding: BufferEncoding | undefined): Buffer {
  return typeof chunk === "string" ? Buffer.from(chunk, encoding) : Buffer.from(chunk as Uint8Array);
}
