import { status } from "@grpc/grpc-js";
import { DuplicateTransactionError, PayloadMismatchError, UnavailableError } from "./errors.js";
import { ClaimOutcome, Transaction as TransactionMessage, type ClaimTransactionResponse } from "./gen/dedup/v1/dedup.js";
import { transactionFrom } from "./transaction.js";

/** Return if the outcome is CLAIMED; throw the matching error otherwise. */
export function requireClaimed(reply: ClaimTransactionResponse): void {
  const holder = () => transactionFrom(reply.transaction ?? TransactionMessage.fromPartial({}));
  switch (reply.outcome) {
    case ClaimOutcome.CLAIM_OUTCOME_CLAIMED:
      return;
    case ClaimOutcome.CLAIM_OUTCOME_DUPLICATE:
      throw new DuplicateTransactionError(holder());
    case ClaimOutcome.CLAIM_OUTCOME_PAYLOAD_MISMATCH:
      throw new PayloadMismatchError(holder());
    default:
      throw unspecified("claim");
  }
}

/** Create the error for a missing or unknown outcome. */
export function unspecified(what: string): UnavailableError {
  return new UnavailableError(`the dedup service returned no known outcome of the ${what}`, {
    code: status.UNKNOWN,
    reason: "OUTCOME_UNSPECIFIED",
    applied: "unknown",
  });
}
