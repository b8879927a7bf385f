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

/** Convert a gRPC error. */
export function errorFrom(error: ServiceError): InvalidRequestError | UnavailableError {
  const { info, badRequest, retryInfo } = detailsOf(error);
  if (error.code === status.INVALID_ARGUMENT) {
    return new InvalidRequestError(error.details, badRequest?.fieldViolations ?? []);
  }
  const delay = retryInfo?.retryDelay;
  const failure = {
    code: error.code,
    reason: info?.reason ?? "",
    // gRPC itself made an error without details, so the call may have been applied.
    applied: info?.metadata["applied"] === "no" ? ("no" as const) : ("unknown" as const),
    retryAfterMs: delay && delay.seconds * 1000 + delay.nanos / 1e6,
  };
  const cause = failure.reason || status[error.code];
  return new UnavailableError(`the dedup service did not answer: ${cause}: ${error.details}`, failure, { cause: error });
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

function detailsOf(error: ServiceError): Details {
  const details: Details = {};
  try {
    const [raw] = error.metadata?.get("grpc-status-details-bin") ?? [];
    for (const any of Buffer.isBuffer(raw) ? Status.decode(raw).details : []) {
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
