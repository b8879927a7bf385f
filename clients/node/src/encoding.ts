import { InvalidRequestError } from "./errors.js";
import type { Duration } from "./gen/google/protobuf/duration.js";
import type { Expiry } from "./options.js";
import { requireWellFormed } from "./transaction-id.js";

/** Returns a text as it is, or throws InvalidRequestError where its bytes would be those of another text. */
export function encodeText(field: string, text: string): string {
  requireWellFormed(field, text);
  return text;
}

/** Returns bytes as they are, and a text as UTF-8. */
export function encodeBytes(field: string, value: string | Uint8Array): Buffer {
  return Buffer.from(typeof value === "string" ? encodeText(field, value) : value);
}

/** Returns milliseconds as the contract has them, or throws InvalidRequestError unless they are whole. */
export function encodeDuration(field: string, ms: number): Duration {
  if (!Number.isSafeInteger(ms)) throw InvalidRequestError.of(field, `must be whole milliseconds, not ${ms}`);
  return { seconds: Math.trunc(ms / 1000), nanos: (ms % 1000) * 1e6 };
}

/** Returns an expiry as the contract has it, or throws InvalidRequestError when it says two things or nonsense. */
export function encodeExpiry({ ttlMs, expireTime }: Expiry): { ttl?: Duration; expireTime?: Date } {
  if (ttlMs !== undefined && expireTime !== undefined) {
    throw InvalidRequestError.of("expire_time", "give either it or a ttl");
  }
  if (ttlMs !== undefined) return { ttl: encodeDuration("ttl", ttlMs) };
  if (expireTime === undefined) return {};
  if (Number.isNaN(expireTime.getTime())) throw InvalidRequestError.of("expire_time", "must be a valid date");
  return { expireTime };
}
