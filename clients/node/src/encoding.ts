import { InvalidRequestError } from "./errors.js";
import type { Duration } from "./gen/google/protobuf/duration.js";
import type { Expiry } from "./options.js";
import { requireWellFormed } from "./transaction-id.js";

/** Return the text; throws InvalidRequestError if its UTF-8 would equal another text's. */
export function encodeText(field: string, text: string): string {
  requireWellFormed(field, text);
  return text;
}

/** Return bytes unchanged, and text as UTF-8. */
export function encodeBytes(field: string, value: string | Uint8Array): Buffer {
  return Buffer.from(typeof value === "string" ? encodeText(field, value) : value);
}

// The largest that the service can be configured to keep; more could not be sent.
const MAX_RESULT_BYTES = 1_048_576;

/** Encode a result; throws InvalidRequestError if no service keeps it. */
export function encodeResult(result: unknown): Buffer {
  if (typeof result !== "string" && !(result instanceof Uint8Array)) {
    throw InvalidRequestError.of("result", `must be a string or bytes, not ${result === null ? "null" : typeof result}`);
  }
  const bytes = encodeBytes("result", result);
  if (bytes.length <= MAX_RESULT_BYTES) return bytes;
  throw InvalidRequestError.of("result", `has ${bytes.length} bytes; it must have at most ${MAX_RESULT_BYTES}`);
}

/** Encode whole milliseconds; throws InvalidRequestError for fractions. */
export function encodeDuration(field: string, ms: number): Duration {
  if (!Number.isSafeInteger(ms)) throw InvalidRequestError.of(field, `must be whole milliseconds, not ${ms}`);
  return { seconds: Math.trunc(ms / 1000), nanos: (ms % 1000) * 1e6 };
}

/** Encode an expiry; throws InvalidRequestError if invalid or with both fields. */
export function encodeExpiry({ ttlMs, expireTime }: Expiry): { ttl?: Duration; expireTime?: Date } {
  if (ttlMs !== undefined && expireTime !== undefined) {
    throw InvalidRequestError.of("expire_time", "must not be set together with ttl");
  }
  if (ttlMs !== undefined) return { ttl: encodeDuration("ttl", ttlMs) };
  if (expireTime === undefined) return {};
  if (Number.isNaN(expireTime.getTime())) throw InvalidRequestError.of("expire_time", "must be a valid date");
  return { expireTime };
}
