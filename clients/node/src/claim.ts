import { inspect, type InspectOptions } from "node:util";
import type { Budget, Channel } from "./channel.js";
import { encodeExpiry, encodeResult } from "./encoding.js";
import { ClaimLostError, InvalidRequestError, NotHeldError, ResultNotStoredError } from "./errors.js";
import {
  CompleteOutcome,
  CompleteTransactionRequest,
  DedupServiceService,
  ExtendOutcome,
  ExtendTransactionRequest,
  ReleaseOutcome,
  ReleaseTransactionRequest,
} from "./gen/dedup/v1/dedup.js";
import type { KeepAlive, Lease } from "./keep-alive.js";
import type { CompleteOptions, EndOptions, ExtendOptions } from "./options.js";
import { unspecified } from "./outcome.js";
import { transactionFrom, type Transaction } from "./transaction.js";

export interface Grant {
  transactionId: string;
  /** Empty for the service's default namespace. */
  namespace: string;
  token: string;
  /** True if an earlier call with the same token made the claim. */
  replayed: boolean;
  /** True if the service was unavailable and `onUnavailable` is "allow": nothing is held, others may proceed too. */
  failOpen: boolean;
  /** True if another caller holds the transaction in a shadow-mode namespace: proceed, but nothing is held. */
  shadowDuplicate: boolean;
  /** The stored transaction; the holder's for a shadow duplicate, undefined for a fail-open grant. */
  transaction: Transaction | undefined;
}

/** How a claim is kept alive. */
export interface Keeping {
  leaseMs: number;
  sentAt: number;
  maxHoldMs: number;
}

/**
 * The right to do the work of one transaction.
 *
 * Complete the claim after the work. Release it only if the work certainly did not happen; otherwise let it expire. If
 * nothing is held (`failOpen`, `shadowDuplicate`), `complete`, `release` and `extend` do nothing.
 *
 * The service returns `x-correlation-id` only for calls it logs, so a quick success has none.
 */
export class Claim implements Grant {
  readonly transactionId: string;
  readonly namespace: string;
  readonly replayed: boolean;
  readonly failOpen: boolean;
  readonly shadowDuplicate: boolean;
  transaction: Transaction | undefined;
  // Not printed, since whoever has the token can end the claim.
  readonly #token: string;
  readonly #channel: Channel;
  readonly #budget: Budget;
  readonly #loss = new AbortController();
  #lease: Lease | undefined;
  #ended = false;

  /** @internal Use `Client.claim`. */
  constructor(channel: Channel, budget: Budget, grant: Grant) {
    this.#channel = channel;
    this.#budget = budget;
    this.#token = grant.token;
    this.transactionId = grant.transactionId;
    this.namespace = grant.namespace;
    this.replayed = grant.replayed;
    this.failOpen = grant.failOpen;
    this.shadowDuplicate = grant.shadowDuplicate;
    this.transaction = grant.transaction;
  }

  /** Authorises changes to the claim; keep it secret. */
  get token(): string {
    return this.#token;
  }

  /** Aborts with a ClaimLostError when the claim is lost: stop the work. */
  get signal(): AbortSignal {
    return this.#loss.signal;
  }

  /** True after the claim was lost. */
  get lost(): boolean {
    return this.#loss.signal.aborted;
  }

  /** True after `complete`, `release` or `keep` was called, even if it failed. */
  get ended(): boolean {
    return this.#ended;
  }

  /** @internal Extend the claim while its work runs. */
  keepAlive(keepAlive: KeepAlive, keeping: Keeping): void {
    if (this.#holdsNothing()) return;
    this.#lease = keepAlive.hold({
      ...keeping,
      replayed: this.replayed,
      extend: (ttlMs, leftMs) => this.#extendOnce(ttlMs, leftMs),
      lost: () => this.#lose(),
    });
  }

  /**
   * Record the work as done and keep its result for later duplicates.
   *
   * By default the service limits the result to 4,096 bytes. Repeating it with the same result is safe. Throws
   * ResultNotStoredError after the transaction was completed without a result that cannot be stored, and NotHeldError,
   * UnavailableError or InvalidRequestError.
   */
  async complete(result: string | Uint8Array = "", options: CompleteOptions = {}): Promise<void> {
    await this.completeOr(result, new Uint8Array(), options);
  }

  /** @internal Complete with `otherwise` in place of a result that cannot be stored. */
  async completeOr(result: string | Uint8Array, otherwise: Uint8Array, options: CompleteOptions): Promise<void> {
    this.#end();
    const expiry = encodeExpiry(options);
    if (this.#holdsNothing()) return;
    const send = async (bytes: Uint8Array) => {
      const request = CompleteTransactionRequest.fromPartial({ ...this.#held(), result: Buffer.from(bytes), ...expiry });
      const method = DedupServiceService.completeTransaction;
      const { reply } = await this.#channel.call(method, () => request, this.#within(options));
      if (reply.outcome === CompleteOutcome.COMPLETE_OUTCOME_NOT_HELD) throw new NotHeldError(this.transactionId);
      if (reply.outcome !== CompleteOutcome.COMPLETE_OUTCOME_COMPLETED) throw unspecified("completion");
      this.#update(reply.transaction);
    };
    try {
      await send(encodeResult(result));
    } catch (error) {
      if (!(error instanceof InvalidRequestError && isOfResult(error))) throw error;
      // Work that is done must not be done again.
      await send(otherwise);
      throw new ResultNotStoredError(this.transactionId, error.message, { cause: error });
    }
  }

  /** Release the claim: the next caller may claim at once. Throws NotHeldError or UnavailableError. */
  async release(options: EndOptions = {}): Promise<void> {
    this.#end();
    if (this.#holdsNothing()) return;
    const request = ReleaseTransactionRequest.fromPartial(this.#held());
    const { reply, doubt } = await this.#channel.call(
      DedupServiceService.releaseTransaction,
      () => request,
      this.#within(options),
    );
    // After a lost reply, "not held" may be the effect of this release.
    const gone = reply.outcome === ReleaseOutcome.RELEASE_OUTCOME_NOT_HELD;
    if (gone && !doubt) throw new NotHeldError(this.transactionId);
    if (!gone && reply.outcome !== ReleaseOutcome.RELEASE_OUTCOME_RELEASED) throw unspecified("release");
  }

  /** Keep the claim until it expires, because the effect of its work is unknown; it is no longer extended. */
  keep(): void {
    this.#end();
  }

  /**
   * Extend the claim to `ttlMs` from now. An earlier end has no effect without `allowShortening`, which ends keep-alive.
   * Throws NotHeldError or UnavailableError.
   */
  async extend(ttlMs?: number, options: ExtendOptions = {}): Promise<void> {
    const allowShortening = options.allowShortening ?? false;
    const request = ExtendTransactionRequest.fromPartial({ ...this.#held(), ...encodeExpiry({ ttlMs }), allowShortening });
    if (this.#holdsNothing()) return;
    // Keep-alive does not know the new lease.
    if (allowShortening) this.#lease?.end();
    const budget = { ...this.#within(options), signal: options.signal };
    const { reply, sentAt } = await this.#channel.call(DedupServiceService.extendTransaction, () => request, budget);
    if (reply.outcome === ExtendOutcome.EXTEND_OUTCOME_NOT_HELD) {
      this.#lose();
      throw new NotHeldError(this.transactionId);
    }
    if (reply.outcome !== ExtendOutcome.EXTEND_OUTCOME_EXTENDED) throw unspecified("extension");
    this.#update(reply.transaction);
    if (ttlMs !== undefined) this.#lease?.renew(sentAt, ttlMs);
  }

  /** Without the token. */
  toJSON(): object {
    const { transactionId, namespace, replayed, failOpen, shadowDuplicate, ended, lost, transaction } = this;
    return { transactionId, namespace, replayed, failOpen, shadowDuplicate, ended, lost, transaction };
  }

  [inspect.custom](_depth: number, options: InspectOptions): string {
    return `Claim ${inspect(this.toJSON(), options)}`;
  }

  async #extendOnce(ttlMs: number, leftMs: number): Promise<boolean> {
    const request = ExtendTransactionRequest.fromPartial({ ...this.#held(), ...encodeExpiry({ ttlMs }) });
    const limitMs = Math.floor(Math.min(leftMs, this.#budget.attemptTimeoutMs));
    const { metadata } = this.#budget;
    const reply = await this.#channel.attempt(DedupServiceService.extendTransaction, request, { limitMs, metadata });
    if (reply.outcome === ExtendOutcome.EXTEND_OUTCOME_NOT_HELD) return false;
    if (reply.outcome !== ExtendOutcome.EXTEND_OUTCOME_EXTENDED) throw unspecified("extension");
    if (!this.#ended) this.#update(reply.transaction);
    return true;
  }

  #lose(): void {
    this.#lease?.end();
    if (!this.lost) this.#loss.abort(new ClaimLostError(this.transactionId));
  }

  #end(): void {
    this.#ended = true;
    this.#lease?.end();
  }

  #held() {
    return { transactionId: this.transactionId, namespace: this.namespace, claimToken: this.#token };
  }

  #holdsNothing(): boolean {
    return this.failOpen || this.shadowDuplicate;
  }

  #within({ timeoutMs }: EndOptions): Budget {
    return { ...this.#budget, timeoutMs: timeoutMs ?? this.#budget.timeoutMs };
  }

  #update(message: Parameters<typeof transactionFrom>[0] | undefined): void {
    if (message !== undefined) this.transaction = transactionFrom(message);
  }
}

function isOfResult({ violations }: InvalidRequestError): boolean {
  return violations.length > 0 && violations.every(({ field }) => field === "result");
}
