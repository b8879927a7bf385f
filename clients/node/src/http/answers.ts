import type { ServerResponse } from "node:http";
import {
  DuplicateTransactionError,
  InvalidRequestError,
  PayloadMismatchError,
  UnavailableError,
} from "../errors.js";
import { BodyTooLargeError } from "./body.js";
import { KeyError } from "./identity.js";
import { decodeStored, type Header } from "./stored.js";

/** A response of the guard. */
export interface Answer {
  status: number;
  headers: readonly Header[];
  body: Buffer;
}

const PAGE = "https://github.com/dedup-service/dedup-service/blob/main/docs/client-contract.md#";
const RETRY: Header = ["Retry-After", "1"];

/** Return the answer for an error of the guard; undefined for a bug or a wrong option. */
export function answerTo(error: unknown, replayedHeader: string | false): Answer | undefined {
  const marks: Header[] = replayedHeader === false ? [] : [[replayedHeader, "true"]];
  if (error instanceof DuplicateTransactionError) {
    return error.holder.state === "completed" ? replay(error.holder.result, marks) : inProgress();
  }
  if (error instanceof PayloadMismatchError) {
    const title = "The Idempotency-Key was used for another request";
    return problem("key-reused", 422, title, "Send a new key with a new request.");
  }
  // Of the fields that the caller chose, only the id can be invalid.
  const tooLong = error instanceof InvalidRequestError && error.violations.some(({ field }) => field === "transaction_id");
  if (error instanceof KeyError || tooLong) {
    const detail = tooLong ? "The Idempotency-Key is too long: with caller, method and path it may have 512 bytes." : error.message;
    return problem("key-invalid", 400, "The Idempotency-Key is missing or invalid", detail);
  }
  if (error instanceof BodyTooLargeError) {
    const detail = `A request with an Idempotency-Key may have a body of up to ${error.limit} bytes.`;
    return problem("body-too-large", 413, "The request body is too large", detail);
  }
  if (error instanceof UnavailableError) {
    const title = "The check for duplicate requests is unavailable";
    return problem("unavailable", 503, title, "The request was not run. Send it again with the same key.", RETRY);
  }
  return undefined;
}

/** Send an answer of the guard. */
export function respond(res: ServerResponse, { status, headers, body }: Answer): void {
  res.statusCode = status;
  for (const name of new Set(headers.map(([name]) => name))) {
    const values = headers.flatMap(([other, value]) => (other === name ? [value] : []));
    res.setHeader(name, values.length === 1 ? values[0]! : values);
  }
  res.end(body.length > 0 ? body : undefined);
}

function replay(result: Buffer, marks: readonly Header[]): Answer {
  const stored = decodeStored(result);
  if (stored?.body !== undefined) {
    return { status: stored.status!, headers: [...stored.headers, ...marks], body: stored.body };
  }
  const location = stored?.headers.find(([name]) => name === "location");
  if (location !== undefined) return { status: 303, headers: [location, ...marks], body: Buffer.alloc(0) };
  const detail = "The first request with this key has ended, and is not run again. Its response is not stored.";
  return problem("response-not-stored", 410, "The response is not stored", detail, ...marks);
}

function inProgress(): Answer {
  const detail =
    "The first request with this key has not ended, or its effect is unknown. Send the same request again later.";
  return problem("in-progress", 409, "A request with this Idempotency-Key is in progress", detail, RETRY);
}

/** Return a problem document (RFC 9457). */
function problem(heading: string, status: number, title: string, detail: string, ...headers: Header[]): Answer {
  const body = Buffer.from(JSON.stringify({ type: PAGE + heading, title, status, detail }));
  return { status, headers: [["Content-Type", "application/problem+json"], ...headers], body };
}
