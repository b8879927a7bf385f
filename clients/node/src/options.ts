import type { ChannelCredentials, ChannelOptions } from "@grpc/grpc-js";

/** Where warnings go; `console` is one. */
export interface Logger {
  warn(message: string, details: object): void;
}

/** What a claim answers while the service cannot be asked: an error, or a grant that guards nothing. */
export type OnUnavailable = "deny" | "allow";

/** What is the same for all calls of a client. */
export interface ClientOptions {
  /** Default: plaintext. */
  credentials?: ChannelCredentials | undefined;
  /** Options of grpc-js, over those of this client. */
  channelOptions?: ChannelOptions | undefined;
  /** Default: that of the service, "default". */
  namespace?: string | undefined;
  /** Who claims, shown to duplicates; empty by default. */
  claimant?: string | undefined;
  /** How long a logical call may take with its retries, and without its wait; default 2000. */
  timeoutMs?: number | undefined;
  /** How long one attempt may take; default 1000. */
  attemptTimeoutMs?: number | undefined;
  /** Default "deny". */
  onUnavailable?: OnUnavailable | undefined;
  /** Told of fail-open grants, and of a release that failed after the work had; default `console`. */
  logger?: Logger | undefined;
}

/** What every logical call takes. */
export interface CallOptions {
  /** Instead of the client's. */
  timeoutMs?: number | undefined;
  /** Ends the call with the reason of the signal; what was asked by then may still be applied. */
  signal?: AbortSignal | undefined;
}

/** How long something is kept: either of the two, or what the service is configured to. */
export interface Expiry {
  /** From now, in whole milliseconds. */
  ttlMs?: number | undefined;
  /** Until this moment, by the clock of the store. */
  expireTime?: Date | undefined;
}

/** What a claim may say. */
export interface ClaimOptions extends CallOptions, Expiry {
  /** Instead of the client's. */
  namespace?: string | undefined;
  /** Instead of the client's. */
  claimant?: string | undefined;
  /** A digest of what the transaction is about, at most 64 bytes: the same id with another one is a mismatch. */
  fingerprint?: string | Uint8Array | undefined;
  /** How long a duplicate of work in progress may wait for its end, on top of `timeoutMs`; at most 5 minutes. */
  waitMs?: number | undefined;
  /** For repeating an earlier logical call, whose token this was; a fresh one by default. Never share one. */
  token?: string | undefined;
  /** Instead of the client's. */
  onUnavailable?: OnUnavailable | undefined;
}

/** What a completion may say; the expiry is how long the completed transaction is remembered. */
export interface CompleteOptions extends CallOptions, Expiry {}

/** Where to look a transaction up. */
export interface GetOptions extends CallOptions {
  /** Instead of the client's. */
  namespace?: string | undefined;
}
