import type { ChannelCredentials, ChannelOptions, Metadata } from "@grpc/grpc-js";

/** Receives warnings, for example `console`. */
export interface Logger {
  warn(message: string, details: object): void;
}

/** Whether a claim throws ("deny") or returns an unprotected grant ("allow") in an outage of the service. */
export type OnUnavailable = "deny" | "allow";

/** Options for all calls of a client. */
export interface ClientOptions {
  /** Default: plaintext. */
  credentials?: ChannelCredentials | undefined;
  /** Options of grpc-js; they override this client's. */
  channelOptions?: ChannelOptions | undefined;
  /** Default: the service's, "default". */
  namespace?: string | undefined;
  /** The claimant shown to duplicates; empty by default. */
  claimant?: string | undefined;
  /** The budget of a call with its retries, without its wait; default 2000. */
  timeoutMs?: number | undefined;
  /** The limit of one attempt, without its wait; default 1000. */
  attemptTimeoutMs?: number | undefined;
  /** Default "deny". */
  onUnavailable?: OnUnavailable | undefined;
  /** Send claims that find others in flight together in one call; default true. */
  coalesce?: boolean | undefined;
  /** Receives warnings about fail-open grants and failed releases; default `console`. */
  logger?: Logger | undefined;
}

/** Metadata of the calls; the service logs a call under its `x-correlation-id`. */
export type CallMetadata = Metadata | Readonly<Record<string, string>>;

/** Complete and release take no signal: they also run after the caller has gone. */
export interface EndOptions {
  /** Default: the client's. */
  timeoutMs?: number | undefined;
}

export interface CallOptions extends EndOptions {
  /** Aborts the call with the signal's reason. */
  signal?: AbortSignal | undefined;
}

/** Set one field at most; the service has a default. */
export interface Expiry {
  /** From now, in whole milliseconds. */
  ttlMs?: number | undefined;
  /** At this time, by the store's clock. */
  expireTime?: Date | undefined;
}

export interface ClaimOptions extends CallOptions, Expiry {
  /** Default: the client's. */
  namespace?: string | undefined;
  /** Default: the client's. */
  claimant?: string | undefined;
  /** A digest of the payload, at most 64 bytes; the same id with another digest is a mismatch. */
  fingerprint?: string | Uint8Array | undefined;
  /** How long a duplicate waits for work in progress to end, in addition to `timeoutMs`; at most 5 minutes. */
  waitMs?: number | undefined;
  /** The token of an earlier logical call, to repeat it; default: a new one. Never share one. */
  token?: string | undefined;
  /** Default: the client's. */
  onUnavailable?: OnUnavailable | undefined;
  /** Extend the claim while its work runs, unless it has an `expireTime`; default false, in `once` true. */
  keepAlive?: boolean | undefined;
  /** No extension ends later than this long after the claim; default one hour. */
  maxHoldMs?: number | undefined;
  /** Sent with the claim, and with its completion, release and extensions. */
  metadata?: CallMetadata | undefined;
}

/** A class of errors. */
export type ErrorClass = abstract new (...args: any[]) => unknown;

export interface OnceOptions extends ClaimOptions {
  /** Errors of the work which mean that nothing was done: the claim is released. Others keep it until it expires. */
  releaseOn?: readonly ErrorClass[] | ((error: unknown) => boolean) | undefined;
}

/** The expiry is that of the completed transaction. */
export interface CompleteOptions extends EndOptions, Expiry {}

export interface ExtendOptions extends CallOptions {
  /** Permits an earlier end than the present one; default false. */
  allowShortening?: boolean | undefined;
}

export interface GetOptions extends CallOptions {
  metadata?: CallMetadata | undefined;
  /** Default: the client's. */
  namespace?: string | undefined;
}
