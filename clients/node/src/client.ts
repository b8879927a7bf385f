import { randomBytes } from "node:crypto";
import { status } from "@grpc/grpc-js";
import { Channel, GrpcTransport, type Budget } from "./channel.js";
import { Claim, type Grant } from "./claim.js";
import { Coalescer } from "./coalescer.js";
import { ATTEMPT_TIMEOUT_MS, BUDGET_MS } from "./defaults.js";
import { encodeBytes, encodeDuration, encodeExpiry, encodeText } from "./encoding.js";
import { ClientClosedError, InvalidRequestError, NotHeldError, UnavailableError } from "./errors.js";
import { isOutage } from "./failure.js";
import {
  ClaimTransactionRequest,
  DedupServiceService,
  GetTransactionRequest,
  type ClaimTransactionResponse,
} from "./gen/dedup/v1/dedup.js";
import { KeepAlive, MAX_HOLD_MS } from "./keep-alive.js";
import type { CallMetadata, CallOptions, ClaimOptions, ClientOptions, GetOptions, OnceOptions } from "./options.js";
import { requireClaimed } from "./outcome.js";
import { loggedId } from "./transaction-id.js";
import { transactionFrom, type Transaction } from "./transaction.js";

/** A client of the dedup service. Use one per process. */
export class Client {
  readonly #channel: Channel;
  readonly #options: ClientOptions;
  readonly #keepAlive: KeepAlive;

  /** Create a client of `host:port` or `unix:///path`; it connects on the first call. */
  constructor(target: string, options?: ClientOptions);
  /** @internal */
  constructor(target: string | Channel, options?: ClientOptions);
  constructor(target: string | Channel, options: ClientOptions = {}) {
    this.#channel = target instanceof Channel ? target : channelTo(target, options);
    this.#options = options;
    this.#keepAlive = new KeepAlive(this.#channel.timers);
  }

  /**
   * Claim a transaction: exactly one caller gets a handle, until its claim expires or is released.
   *
   * All attempts send one token, so a retry is never mistaken for a duplicate. A claim that may have been made, but was
   * aborted or not answered, is released in the background unless it has a `token` of the caller. Throws
   * DuplicateTransactionError, PayloadMismatchError, InvalidRequestError, or UnavailableError if the outcome is unknown.
   */
  async claim(transactionId: string, options: ClaimOptions = {}): Promise<Claim> {
    // No other logical call sends this token.
    const token = options.token ?? newToken();
    const namespace = options.namespace ?? this.#options.namespace ?? "";
    const request = this.#claimRequest(transactionId, namespace, token, options);
    const grant = { transactionId, namespace, token, replayed: false, failOpen: false, shadowDuplicate: false };
    const handle = (grant: Grant) => new Claim(this.#channel, this.#budget({}, options.metadata), grant);
    let sent = false;
    let answer: { reply: ClaimTransactionResponse; sentAt: number };
    try {
      answer = await this.#channel.call(
        DedupServiceService.claimTransaction,
        ({ waitMs }) => {
          sent = true;
          return { ...request, wait: waitMs > 0 ? encodeDuration("wait", waitMs) : undefined };
        },
        { ...this.#budget(options, options.metadata), waitMs: options.waitMs ?? 0 },
      );
    } catch (error) {
      const unavailable = error instanceof UnavailableError;
      if (unavailable && this.#mayGoOn(error, options)) {
        const { code, reason, applied } = error;
        this.#log("dedup service unavailable: proceeding without a claim", transactionId, { code, reason, applied });
        return handle({ ...grant, failOpen: true, transaction: undefined });
      }
      const doubt = unavailable ? error.applied === "unknown" : sent && options.signal?.aborted;
      // A caller with a token of its own may repeat the claim with it.
      if (doubt && options.token === undefined) void this.#giveUp(handle({ ...grant, transaction: undefined }));
      throw error;
    }
    const { reply, sentAt } = answer;
    requireClaimed(reply);
    const { replayed, shadowDuplicate } = reply;
    const transaction = reply.transaction && transactionFrom(reply.transaction);
    const claim = handle({ ...grant, replayed, shadowDuplicate, transaction });
    if (options.keepAlive && options.expireTime === undefined) this.#hold(claim, sentAt, options);
    return claim;
  }

  /**
   * Claim a transaction, do the work and complete it.
   *
   * The claim is extended while the work runs; `claim.signal` aborts when it is lost. If the work throws, the claim is
   * kept until it expires, because the effect is unknown; an error that matches `releaseOn` releases it. The work may
   * complete the claim itself, to keep a result. The signal of the options applies to the claim only. Throws the errors
   * of `claim`, `work` and `complete`; after the last, the work is done but not recorded.
   */
  async once<T>(
    transactionId: string,
    options: OnceOptions,
    work: (claim: Claim) => T | PromiseLike<T>,
  ): Promise<T> {
    const claim = await this.claim(transactionId, { ...options, keepAlive: options.keepAlive ?? true });
    let value: T;
    try {
      value = await work(claim);
    } catch (error) {
      if (!claim.ended) {
        if (matches(error, options.releaseOn)) await this.#giveBack(claim);
        else claim.keep();
      }
      throw error;
    }
    if (!claim.ended) await claim.complete();
    return value;
  }

  /** Read a transaction without changing it; undefined if nobody holds it. Throws UnavailableError. */
  async get(transactionId: string, options: GetOptions = {}): Promise<Transaction | undefined> {
    const request = GetTransactionRequest.fromPartial({
      transactionId: encodeText("transaction_id", transactionId),
      namespace: encodeText("namespace", options.namespace ?? this.#options.namespace ?? ""),
    });
    try {
      const budget = this.#budget(options, options.metadata);
      const { reply } = await this.#channel.call(DedupServiceService.getTransaction, () => request, budget);
      return reply.transaction && transactionFrom(reply.transaction);
    } catch (error) {
      const absent = error instanceof UnavailableError && error.reason === "TRANSACTION_NOT_FOUND";
      if (absent && error.code === status.NOT_FOUND) return undefined;
      throw error;
    }
  }

  /** Close the connection for good; in-flight and later calls throw ClientClosedError. */
  close(): void {
    this.#keepAlive.close();
    this.#channel.close();
  }

  /** @internal Log a failure of a claim, without the transaction id. */
  warn(message: string, claim: Claim, error: unknown): void {
    this.#log(message, claim.transactionId, summary(error));
  }

  #log(message: string, transactionId: string, details: object): void {
    (this.#options.logger ?? console).warn(message, { transaction: loggedId(transactionId), ...details });
  }

  #claimRequest(transactionId: string, namespace: string, token: string, options: ClaimOptions) {
    // The service would create a token per attempt, and a retry would be a duplicate.
    if (token === "") throw InvalidRequestError.of("claim_token", "must not be empty");
    if (options.waitMs !== undefined && options.waitMs < 0) throw InvalidRequestError.of("wait", "must not be negative");
    if (options.maxHoldMs !== undefined && !(options.maxHoldMs > 0)) throw new RangeError("maxHoldMs must be positive");
    encodeDuration("wait", options.waitMs ?? 0);
    return ClaimTransactionRequest.fromPartial({
      transactionId: encodeText("transaction_id", transactionId),
      namespace: encodeText("namespace", namespace),
      claimToken: encodeText("claim_token", token),
      claimant: encodeText("claimant", options.claimant ?? this.#options.claimant ?? ""),
      payloadFingerprint: encodeBytes("payload_fingerprint", options.fingerprint ?? ""),
      ...encodeExpiry(options),
    });
  }

  #mayGoOn(error: UnavailableError, options: ClaimOptions): boolean {
    return (options.onUnavailable ?? this.#options.onUnavailable ?? "deny") === "allow" && isOutage(error);
  }

  #hold(claim: Claim, sentAt: number, { ttlMs, waitMs, maxHoldMs = MAX_HOLD_MS }: ClaimOptions): void {
    const { claimTime, expireTime } = claim.transaction ?? {};
    const leaseMs = ttlMs ?? (claimTime && expireTime && expireTime.getTime() - claimTime.getTime());
    // A claim that waited was made long after it was sent.
    if (waitMs) sentAt = this.#channel.timers.now();
    if (leaseMs !== undefined) claim.keepAlive(this.#keepAlive, { leaseMs, sentAt, maxHoldMs });
  }

  async #giveBack(claim: Claim): Promise<void> {
    try {
      await claim.release();
    } catch (error) {
      // The caller receives the work's error, and the claim expires.
      this.warn("dedup claim not released", claim, error);
    }
  }

  /** Release a claim that may have been made. */
  async #giveUp(claim: Claim): Promise<void> {
    try {
      await claim.release();
    } catch (error) {
      // "Not held" is the usual answer: the claim was not made.
      if (!(error instanceof NotHeldError || error instanceof ClientClosedError)) {
        this.warn("dedup claim not released", claim, error);
      }
    }
  }

  #budget({ timeoutMs = this.#options.timeoutMs ?? BUDGET_MS, signal }: CallOptions, metadata?: CallMetadata): Budget {
    return { timeoutMs, attemptTimeoutMs: this.#options.attemptTimeoutMs ?? ATTEMPT_TIMEOUT_MS, signal, metadata };
  }
}

function channelTo(target: string, options: ClientOptions): Channel {
  const transport = new GrpcTransport(target, options.credentials, options.channelOptions);
  if (options.coalesce === false) return new Channel(transport);
  return new Channel(transport, new Coalescer(transport, options.attemptTimeoutMs ?? ATTEMPT_TIMEOUT_MS));
}

function matches(error: unknown, listed: OnceOptions["releaseOn"] = []): boolean {
  return typeof listed === "function" ? listed(error) : listed.some((kind) => error instanceof kind);
}

/** The error's message may contain the transaction id. */
function summary(error: unknown): object {
  if (!(error instanceof Error)) return { error: typeof error };
  if (!(error instanceof UnavailableError)) return { error: error.name };
  return { error: error.name, code: error.code, reason: error.reason, applied: error.applied };
}

/** Return a token for one logical call: 128 random bits. */
export function newToken(): string {
  return randomBytes(16).toString("base64url");
}
