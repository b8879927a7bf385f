import { TransactionState, type Transaction as TransactionMessage } from "./gen/dedup/v1/dedup.js";

/** A claimed transaction, as anybody may see it. */
export interface Transaction {
  transactionId: string;
  namespace: string;
  /** "unknown" is a state that this version of the client has not heard of. */
  state: "in progress" | "completed" | "unknown";
  /** Who claimed it, in the words of that caller; may be empty. */
  claimant: string;
  /** When it was claimed; undefined when the claim was not written by the service. */
  claimTime: Date | undefined;
  /** When it will be forgotten; undefined when that is not known. */
  expireTime: Date | undefined;
  /** When it was completed; undefined while it is in progress. */
  completionTime: Date | undefined;
  /** The result that its holder gave on completion; empty while it is in progress. */
  result: Buffer;
}

const STATES: Partial<Record<TransactionState, Transaction["state"]>> = {
  [TransactionState.TRANSACTION_STATE_IN_PROGRESS]: "in progress",
  [TransactionState.TRANSACTION_STATE_COMPLETED]: "completed",
};

/** Reads a transaction of a reply. */
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
