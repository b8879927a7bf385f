import { status, type ServiceError } from "@grpc/grpc-js";
import { InvalidRequestError, UnavailableError } from "./errors.js";
import { BadRequest, ErrorInfo, RetryInfo } from "./gen/google/rpc/error_details.js";
import { Status } from "./gen/google/rpc/status.js";

const DOMAIN = "dedup.v1";

interface Details {
  info?: ErrorInfo;
  badRequest?: BadRequest;
  retryInfo?: RetryInfo;
}

// How grpc-js words the errors of calls for which it had no connection; it has no other sign.
const NOT_SENT = /^(\w+: )?No connection established|^Name resolution failed for target|,Waiting for LB pick$/;

/** Convert a gRPC error. */
export function errorFrom(error: ServiceError): InvalidRequestError | UnavailableError {
  const [raw] = error.metadata?.get("grpc-status-details-bin") ?? [];
  const details = detailsOf(Buffer.isBuffer(raw) ? raw : Buffer.alloc(0));
  return convert(error.code, error.details, details, error);
}

/** Convert the error of one claim of a batch. */
export function errorFromStatus(error: Status): InvalidRequestError | UnavailableError {
  return convert(error.code, error.message, detailsOf(Buffer.from(Status.encode(error).finish())), undefined);
}

function convert(
  code: status,
  text: string,
  { info, badRequest, retryInfo }: Details,
  cause: ServiceError | undefined,
): InvalidRequestError | UnavailableError {
  if (code === status.INVALID_ARGUMENT) return new InvalidRequestError(text, badRequest?.fieldViolations ?? []);
  const delay = retryInfo?.retryDelay;
  const failure = {
    code,
    reason: info?.reason ?? "",
    applied: nothingDone(info, text) ? ("no" as const) : ("unknown" as const),
    retryAfterMs: delay && delay.seconds * 1000 + delay.nanos / 1e6,
  };
  const why = failure.reason || status[code];
  return new UnavailableError(`the dedup service did not answer: ${why}: ${text}`, failure, cause && { cause });
}

/** gRPC itself makes errors without details: their calls may have been applied, unless they were not sent. */
function nothingDone(info: ErrorInfo | undefined, text: string): boolean {
  return info === undefined ? NOT_SENT.test(text) : info.metadata["applied"] === "no";
}

/** Report whether the service was unavailable, not refusing; only then does "allow" apply. */
export function isOutage(error: UnavailableError): boolean {
  switch (error.code) {
    case status.UNAVAILABLE:
    case status.RESOURCE_EXHAUSTED:
    case status.DEADLINE_EXCEEDED:
      return true;
    case status.CANCELLED:
    // A server in shutdown cancels calls. The caller's own abort does not reach this point.
    case status.INTERNAL:
      // grpc-js reports some broken connections as INTERNAL; the service always adds a reason.
      return error.reason === "";
    default:
      return false;
  }
}

export function isRetryable(error: UnavailableError): boolean {
  // The service adds a delay to every retryable error except DEADLINE_EXCEEDED.
  const final = error.reason !== "" && error.retryAfterMs === undefined && error.code !== status.DEADLINE_EXCEEDED;
  return isOutage(error) && !final;
}

function detailsOf(raw: Buffer): Details {
  const details: Details = {};
  try {
    for (const any of Status.decode(raw).details) {
      const type = any.typeUrl.slice(any.typeUrl.lastIndexOf("/") + 1);
      if (type === "google.rpc.ErrorInfo") {
        const info = ErrorInfo.decode(any.value);
        if (info.domain === DOMAIN) details.info = info;
      } else if (type === "google.rpc.BadRequest") {
        details.badRequest = BadRequest.decode(any.value);
      } else if (type === "google.rpc.RetryInfo") {
        details.retryInfo = RetryInfo.decode(any.value);
      }
    }
  } catch {
    // Without details the error still has its code.
  }
  return details;
}
