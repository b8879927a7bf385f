/** A header with its name in any case. */
export type Header = readonly [name: string, value: string];

/** A response of the application. */
export interface Recorded {
  status: number;
  headers: readonly Header[];
  body: Buffer;
  /** Sent before it was complete. */
  streamed: boolean;
}

/** A response read from a completed transaction. */
export interface Stored {
  /** Undefined for the older form of a response that was too large. */
  status: number | undefined;
  headers: Header[];
  /** Undefined if it was not stored. */
  body: Buffer | undefined;
}

const STORED_HEADERS = [
  "content-encoding",
  "content-language",
  "content-type",
  "etag",
  "link",
  "location",
  "retry-after",
];

/** Return the names of the headers to store. */
export function storedNames(more: readonly string[] = []): Set<string> {
  const names = new Set([...STORED_HEADERS, ...more.map((name) => name.toLowerCase())]);
  names.delete("set-cookie");
  return names;
}

/** Encode a response; without its body if it was streamed or does not fit. */
export function encodeStored(response: Recorded, names: ReadonlySet<string>, limit: number): Buffer {
  const { status, headers, body, streamed } = response;
  const whole = Buffer.concat([head(status, "replay", headers, names), body]);
  return streamed || whole.length > limit ? encodeNoBody(response, limit) : whole;
}

/** Encode that the response is not stored. */
export function encodeNoBody({ status, headers }: Recorded, limit: number): Buffer {
  const withLocation = head(status, "no-body", headers, new Set(["location"]));
  return withLocation.length > limit ? head(status, "no-body", [], new Set()) : withLocation;
}

function head(status: number, word: string, headers: readonly Header[], names: ReadonlySet<string>): Buffer {
  const lines = headers
    .map(([name, value]) => [name.toLowerCase(), value] as const)
    .filter(([name]) => names.has(name))
    // The sort is stable, so the values of one name keep their order.
    .sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0))
    .map(([name, value]) => `${name}: ${value}\n`);
  return Buffer.from(`dedup-http/2 ${status} ${word}\n${lines.join("")}\n`, "latin1");
}

/** Decode a stored response, also of the two older formats; undefined for anything else. */
export function decodeStored(stored: Buffer): Stored | undefined {
  if (stored.length === 1 && stored[0] === 1) return { status: undefined, headers: [], body: undefined };
  if (stored[0] === 2) return decodeBinary(stored);
  // In latin1 a character is a byte, so positions in the text are those of the body.
  const text = stored.toString("latin1");
  return decodeCurrent(stored, text) ?? decodeFirst(stored, text);
}

function decodeCurrent(stored: Buffer, text: string): Stored | undefined {
  const match = /^dedup-http\/2 ([2-5]\d\d) (replay|no-body)\n((?:[^:\s]+: [^\n]*\n)*)\n/.exec(text);
  if (match === null) return undefined;
  const [all, status, word, lines] = match;
  const headers = lines!.split("\n").slice(0, -1).map((line): Header => {
    const colon = line.indexOf(": ");
    return [line.slice(0, colon), line.slice(colon + 2)];
  });
  return { status: Number(status), headers, body: word === "replay" ? stored.subarray(all.length) : undefined };
}

function decodeFirst(stored: Buffer, text: string): Stored | undefined {
  const match = /^dedup-http\/1 (replay|too-large) ([2-5]\d\d) ([^\n]*)\n/.exec(text);
  if (match === null) return undefined;
  const [all, word, status, type] = match;
  if (word === "too-large") return { status: Number(status), headers: [], body: undefined };
  return { status: Number(status), headers: typed(type!), body: stored.subarray(all.length) };
}

function decodeBinary(stored: Buffer): Stored | undefined {
  if (stored.length < 5) return undefined;
  const status = stored.readUInt16BE(1);
  const end = 5 + stored.readUInt16BE(3);
  if (stored.length < end || status < 200 || status > 599) return undefined;
  return { status, headers: typed(stored.toString("latin1", 5, end)), body: stored.subarray(end) };
}

function typed(type: string): Header[] {
  return type === "" ? [] : [["content-type", type]];
}
