import { createHash } from "node:crypto";
import { transactionId } from "../transaction-id.js";

/** The request has no valid key or path; the message is the detail of the refusal. */
export class KeyError extends Error {
  constructor(message = "Send one header Idempotency-Key with 1 or more visible ASCII characters, such as a UUID.") {
    super(message);
  }
}

const STRING = /^"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])+)"$/;
const BARE = /^[\x21\x23-\x2b\x2d-\x7e]+$/;

/** Return the key of one header: an RFC 8941 string, or bare. Throws KeyError. */
export function parseKey(headers: readonly string[]): string {
  const [header = "", ...others] = headers;
  const text = header.replace(/^[ \t]+|[ \t]+$/g, "");
  const quoted = STRING.exec(text)?.[1];
  if (others.length > 0 || (quoted === undefined && !BARE.test(text))) throw new KeyError();
  return quoted?.replace(/\\(.)/g, "$1") ?? text;
}

/** The parts of a request target. */
export interface Target {
  /** Decoded. */
  path: string;
  /** As sent, one character a byte. */
  query: string;
}

const INVALID_PATH = "The path of the request is not UTF-8 after percent-decoding, or has an invalid percent escape.";

/** Split the request target as the client sent it. Throws KeyError if its path is not UTF-8 or has an invalid escape. */
export function parseTarget(target: string): Target {
  // Proxies send the absolute form.
  const [, rawPath, query = ""] = /^(?:[a-z][a-z0-9+.-]*:\/\/[^/?#]*)?([^?#]*)(?:\?([^#]*))?/i.exec(target)!;
  // Servers and frameworks read an invalid escape in different ways.
  if (/%(?![0-9a-f]{2})/i.test(rawPath!)) throw new KeyError(INVALID_PATH);
  const bytes = (rawPath || "/").replace(/%([0-9a-f]{2})/gi, (_, hex: string) => String.fromCharCode(parseInt(hex, 16)));
  try {
    const path = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Buffer.from(bytes, "latin1"));
    return { path, query };
  } catch {
    throw new KeyError(INVALID_PATH);
  }
}

/** Return the transaction id of a request. Throws InvalidRequestError if it is too long. */
export function requestId(caller: string, method: string, path: string, key: string): string {
  return transactionId("http", caller, method, path, key);
}

/** Return the digest by which a key is known to be used for another request. */
export function fingerprintOf(method: string, { path, query }: Target, body: string | Uint8Array): Buffer {
  const hash = createHash("sha256");
  for (const part of [method, path, Buffer.from(query, "latin1"), body]) {
    const bytes = Buffer.from(part as Uint8Array);
    hash.update(`${bytes.length}:`).update(bytes).update(",");
  }
  return hash.digest();
}
