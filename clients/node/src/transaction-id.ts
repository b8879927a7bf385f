import { createHash } from "node:crypto";
import { InvalidRequestError } from "./errors.js";

const MAX_BYTES = 512;

/**
 * Joins parts into one transaction id, such that different parts never make the same id.
 *
 * Parts are joined with ":"; in a part "%", ":" and control characters are percent-encoded. Every client of the service
 * makes the same id of the same parts. Throws InvalidRequestError when there is no part, when a part is no string or
 * has a lone surrogate, and when the id would be empty or longer than 512 bytes of UTF-8.
 */
export function transactionId(...parts: string[]): string {
  const id = parts.map(escapePart).join(":");
  const bytes = Buffer.byteLength(id);
  if (bytes < 1 || bytes > MAX_BYTES) {
    throw InvalidRequestError.of("transaction_id", `must have 1 to ${MAX_BYTES} bytes of UTF-8, not ${bytes}`);
  }
  return id;
}

function escapePart(part: string): string {
  // Untyped callers: `undefined` would join as nothing, and a number is written differently in every language.
  if (typeof part !== "string") {
    throw InvalidRequestError.of("transaction_id", `every part must be a string, not ${typeof part}`);
  }
  requireWellFormed("transaction_id", part);
  return part.replace(/[%:\u0000-\u001f\u007f-\u009f]/g, (character) =>
    Array.from(Buffer.from(character), (byte) => "%" + byte.toString(16).toUpperCase().padStart(2, "0")).join(""),
  );
}

/** Returns the name of a transaction in logs: 16 hexadecimal digits of a SHA-256, since an id may be personal data. */
export function loggedId(transactionId: string): string {
  return createHash("sha256").update(transactionId).digest("hex").slice(0, 16);
}

/**
 * Throws InvalidRequestError when a text has a lone surrogate.
 *
 * Encoding would turn each into U+FFFD without a word, and so make one id of two.
 */
export function requireWellFormed(field: string, text: string): void {
  if (!text.isWellFormed()) {
    throw InvalidRequestError.of(field, "must not have a lone surrogate, which UTF-8 cannot express");
  }
}
