import { status } from "@grpc/grpc-js";
import type { Transaction } from "./transaction.js";

/** Whether a failed call certainly changed nothing ("no"), or perhaps something ("unknown"). */
export type Applied = "no" | "unknown";

export interface FieldViolation {
  /** The field's name in the contract. */
  field: string;
  /** The violated rule. */
  description: string;
}

/** The base class of this client's errors. */
export abstract class DedupError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** Another caller holds the transaction, or it is completed: do not do the work. HTTP 409. */
export class DuplicateTransactionError extends DedupError {
  constructor(
    /** The holder's transaction; it has a result once completed. */
    readonly holder: Transaction,
  ) {
    super(`transaction ${holder.transactionId} is ${holder.state}, claimed by ${holder.claimant || "an unnamed caller"}`);
  }
}

/** The id exists with another fingerprint: it was reused for different work. HTTP 422. */
export class PayloadMismatchError extends DedupError {
  constructor(
    readonly holder: Transaction,
  ) {
    super(`transaction ${holder.transactionId} exists with another payload fingerprint`);
  }
}

/** The claim expired, was released, was taken by another caller, or is completed; nothing changed. */
export class NotHeldError extends DedupError {
  constructor(readonly transactionId: string) {
    super(`the claim of transaction ${transactionId} is no longer held`);
  }
}

/** The claim was lost while its work ran: it is no longer held, or its lease could not be extended. */
export class ClaimLostError extends DedupError {
  constructor(readonly transactionId: string) {
    super(`the claim of transaction ${transactionId} is lost: another caller may do its work`);
  }
}

/** The transaction was completed without its result, which cannot be stored; do not repeat the work. */
export class ResultNotStoredError extends DedupError {
  constructor(
    readonly transactionId: string,
    reason: string,
    options?: ErrorOptions,
  ) {
    super(`transaction ${transactionId} is completed without its result: ${reason}`, options);
  }
}

/** The client was closed before or during the call; a call in flight may have been applied. */
export class ClientClosedError extends DedupError {
  constructor() {
    super("the client is closed: create another one");
  }
}

/** The request violates the contract; repeating it fails again. */
export class InvalidRequestError extends DedupError {
  constructor(
    message: string,
    /** One per invalid field; empty if the service named none. */
    readonly violations: readonly FieldViolation[],
  ) {
    super(message);
  }

  /** Create the error for one field. */
  static of(field: string, description: string): InvalidRequestError {
    return new InvalidRequestError(`${field}: ${description}`, [{ field, description }]);
  }
}

/** A call without an answer. */
export interface Failure {
  /** The gRPC code. */
  code: status;
  /** The service's stable reason; empty if gRPC itself made the error. */
  reason: string;
  applied: Applied;
  /** The delay the service asks for; undefined if it asks for none. */
  retryAfterMs?: number | undefined;
}

/**
 * The call got no answer, so this may be a duplicate. HTTP 503, never 409.
 *
 * `cause` is the gRPC error, if there is one. If the service answered, its `metadata` has `x-correlation-id`, which
 * finds the call in the service's log.
 */
export class UnavailableError extends DedupError implements Failure {
  readonly code: status;
  readonly reason: string;
  /** Whether any attempt may have changed something. */
  readonly applied: Applied;
  readonly retryAfterMs: number | undefined;

  constructor(message: string, failure: Failure, options?: ErrorOptions) {
    super(message, options);
    this.code = failure.code;
    this.reason = failure.reason;
    this.applied = failure.applied;
    this.retryAfterMs = failure.retryAfterMs;
  }
}
