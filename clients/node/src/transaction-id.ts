import { createHash } from "node:crypto";
import { InvalidRequestError } from "./errors.js";

const MAX_BYTES = 512;

/**
 * Join parts into one transaction id; different parts never make the same id.
 *
 * Parts are joined with ":"; "%", ":" and control characters in a part are percent-encoded. Clients in every language
 * make the same id from the same parts. Throws InvalidRequestError if there are no parts, if a part is not a string or
 * has a lone surrogate, or if the id is empty or longer than 512 bytes of UTF-8.
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
  // Untyped callers: `undefined` would join as nothing, and languages format numbers differently.
  if (typeof part !== "string") {
    throw InvalidRequestError.of("transaction_id", `every part must be a string, not ${typeof part}`);
  }
  requireWellFormed("transaction_id", part);
  return part.replace(/[%:\u0000-\u001f\u007f-\u009f]/g, (character) =>
    Array.from(Buffer.from(character), (byte) => "%" + byte.toString(16).toUpperCase().padStart(2, "0")).join(""),
  );
}

/** Return a transaction's name in logs: 16 hexadecimal digits of the id's SHA-256. An id may be personal data. */
export function loggedId(transactionId: string): string {
  return createHash("sha256").update(transactionId).digest("hex").slice(0, 16);
}

/** Throw InvalidRequestError for a lone surrogate: encoding as U+FFFD would make one id of two. */
export function requireWellFormed(field: string, text: string): void {
  if (!text.isWellFormed()) {
    throw InvalidRequestError.of(field, "must not contain a lone surrogate, because UTF-8 cannot encode it");
  }
}
