import { status } from "@grpc/grpc-js";
import type { Transaction } from "./transaction.js";

/** Whether a failed call may have changed something: "no" is certain, "unknown" is not. */
export type Applied = "no" | "unknown";

/** What is wrong with one field of a request. */
export interface FieldViolation {
  /** The field, as the contract names it. */
  field: string;
  /** What the field must be. */
  description: string;
}

/** What every error of this client is. */
export abstract class DedupError extends Error {
  constructor(message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** Somebody else holds the transaction, or it is completed: do not do the work, and answer 409. */
export class DuplicateTransactionError extends DedupError {
  constructor(
    /** The transaction as its holder has it, with the result once it is completed. */
    readonly holder: Transaction,
  ) {
    super(`transaction ${holder.transactionId} is ${holder.state}, claimed by ${holder.claimant || "somebody"}`);
  }
}

/** The id is known with another fingerprint, so it was reused for different work: answer 422. */
export class PayloadMismatchError extends DedupError {
  constructor(
    /** The transaction as its holder has it. */
    readonly holder: Transaction,
  ) {
    super(`transaction ${holder.transactionId} is known with another payload fingerprint`);
  }
}

/** The claim expired, was given back, was taken by another caller, or is completed; nothing was changed. */
export class NotHeldError extends DedupError {
  constructor(readonly transactionId: string) {
    super(`the claim of transaction ${transactionId} is not held any more`);
  }
}

/** The request breaks the contract, and would each time. */
export class InvalidRequestError extends DedupError {
  constructor(
    message: string,
    /** One for each field that is wrong, where they are known. */
    readonly violations: readonly FieldViolation[],
  ) {
    super(message);
  }

  /** Makes the error of one field. */
  static of(field: string, description: string): InvalidRequestError {
    return new InvalidRequestError(`${field}: ${description}`, [{ field, description }]);
  }
}

/** What is known of a call that was not answered. */
export interface Failure {
  /** The gRPC code. */
  code: status;
  /** Why, in the stable word of the service; empty when gRPC itself made the error. */
  reason: string;
  applied: Applied;
  /** How long the service asks to wait before a retry; undefined where it does not. */
  retryAfterMs?: number | undefined;
}

/** The question was not answered, so nobody knows whether this is a duplicate: answer 503, never 409. */
export class UnavailableError extends DedupError implements Failure {
  readonly code: status;
  readonly reason: string;
  /** Whether the call may have changed something, over all of its attempts. */
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
