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
