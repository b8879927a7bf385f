export { Client } from "./client.js";
export type { Claim } from "./claim.js";
export {
  DedupError,
  DuplicateTransactionError,
  InvalidRequestError,
  NotHeldError,
  PayloadMismatchError,
  UnavailableError,
  type Applied,
  type FieldViolation,
} from "./errors.js";
export type {
  CallOptions,
  ClaimOptions,
  ClientOptions,
  CompleteOptions,
  Expiry,
  GetOptions,
  Logger,
  OnUnavailable,
} from "./options.js";
export type { Transaction } from "./transaction.js";
export { transactionId } from "./transaction-id.js";
