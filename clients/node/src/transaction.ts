import { TransactionState, type Transaction as TransactionMessage } from "./gen/dedup/v1/dedup.js";

/** A claimed transaction, without its token. */
export interface Transaction {
  transactionId: string;
  namespace: string;
  /** "unknown": not known to this version. */
  state: "in progress" | "completed" | "unknown";
  /** The name its claimer gave; may be empty. */
  claimant: string;
  /** Undefined if the service did not write the claim. */
  claimTime: Date | undefined;
  /** Undefined if unknown. */
  expireTime: Date | undefined;
  /** Undefined while in progress. */
  completionTime: Date | undefined;
  /** The result of the completion; empty while in progress. */
  result: Buffer;
}

const STATES: Partial<Record<TransactionState, Transaction["state"]>> = {
  [TransactionState.TRANSACTION_STATE_IN_PROGRESS]: "in progress",
  [TransactionState.TRANSACTION_STATE_COMPLETED]: "completed",
};

export function transactionFrom(message: TransactionMessage): Transaction {
  return {
    transactionId: message.transactionId,
    namespace: message.namespace,
    state: STATES[message.state] ?? "unknown",
    claimant: message.claimant,
    claimTime: message.claimTime,
    expireTime: message.expireTime,
    completionTime: message.completionTime,
    result: message.result,
  };
}
