export { Client } from "./client.js";
export type { Claim } from "./claim.js";
export {
  ClaimLostError,
  ClientClosedError,
  DedupError,
  DuplicateTransactionError,
  InvalidRequestError,
  NotHeldError,
  PayloadMismatchError,
  ResultNotStoredError,
  UnavailableError,
  type Applied,
  type FieldViolation,
} from "./errors.js";
export type {
  CallMetadata,
  CallOptions,
  ClaimOptions,
  ClientOptions,
  CompleteOptions,
  EndOptions,
  ErrorClass,
  Expiry,
  ExtendOptions,
  GetOptions,
  Logger,
  OnceOptions,
  OnUnavailable,
} from "./options.js";
export type { Transaction } from "./transaction.js";
export { transactionId } from "./transaction-id.js";
