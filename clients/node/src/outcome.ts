import { status } from "@grpc/grpc-js";
import { DuplicateTransactionError, PayloadMismatchError, UnavailableError } from "./errors.js";
import { ClaimOutcome, Transaction as TransactionMessage, type ClaimTransactionResponse } from "./gen/dedup/v1/dedup.js";
import { transactionFrom } from "./transaction.js";

/** Returns if a claim was granted, and throws what it was told otherwise: only CLAIMED is "go". */
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

/** Makes the error of a reply that says nothing, or what this version of the client has not heard of. */
export function unspecified(what: string): UnavailableError {
  return new UnavailableError(`the dedup service did not say what became of the ${what}`, {
    code: status.UNKNOWN,
    reason: "OUTCOME_UNSPECIFIED",
    applied: "unknown",
  });
}
