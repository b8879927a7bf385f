import type { Budget, Channel } from "./channel.js";
import { encodeBytes, encodeExpiry } from "./encoding.js";
import { NotHeldError } from "./errors.js";
import {
  CompleteOutcome,
  CompleteTransactionRequest,
  DedupServiceService,
  ExtendOutcome,
  ExtendTransactionRequest,
  ReleaseOutcome,
  ReleaseTransactionRequest,
} from "./gen/dedup/v1/dedup.js";
import type { CallOptions, CompleteOptions } from "./options.js";
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
  readonly token: string;
  readonly replayed: boolean;
  readonly failOpen: boolean;
  readonly shadowDuplicate: boolean;
  transaction: Transaction | undefined;
  #ended = false;

  /** @internal Use `Client.claim`. */
  constructor(
    private readonly channel: Channel,
    private readonly budget: Budget,
    grant: Grant,
  ) {
    this.transactionId = grant.transactionId;
    this.namespace = grant.namespace;
    this.token = grant.token;
    this.replayed = grant.replayed;
    this.failOpen = grant.failOpen;
    this.shadowDuplicate = grant.shadowDuplicate;
    this.transaction = grant.transaction;
  }

  /** True after `complete` or `release` was called, even if it failed. */
  get ended(): boolean {
    return this.#ended;
  }

  /**
   * Record the work as done and keep its result for later duplicates.
   *
   * By default the service limits the result to 4,096 bytes. Repeating it with the same result is safe. Throws
   * NotHeldError, UnavailableError or InvalidRequestError.
   */
  async complete(result: string | Uint8Array = "", options: CompleteOptions = {}): Promise<void> {
    this.#ended = true;
    const request = CompleteTransactionRequest.fromPartial({
      ...this.held(),
      result: encodeBytes("result", result),
      ...encodeExpiry(options),
    });
    if (this.holdsNothing()) return;
    const { reply } = await this.channel.call(DedupServiceService.completeTransaction, () => request, this.within(options));
    if (reply.outcome === CompleteOutcome.COMPLETE_OUTCOME_NOT_HELD) throw new NotHeldError(this.transactionId);
    if (reply.outcome !== CompleteOutcome.COMPLETE_OUTCOME_COMPLETED) throw unspecified("completion");
    this.update(reply.transaction);
  }

  /** Release the claim: the next caller may claim at once. Throws NotHeldError or UnavailableError. */
  async release(options: CallOptions = {}): Promise<void> {
    this.#ended = true;
    if (this.holdsNothing()) return;
    const request = ReleaseTransactionRequest.fromPartial(this.held());
    const { reply, doubt } = await this.channel.call(
      DedupServiceService.releaseTransaction,
      () => request,
      this.within(options),
    );
    // After a lost reply, "not held" may be the effect of this release.
    const gone = reply.outcome === ReleaseOutcome.RELEASE_OUTCOME_NOT_HELD;
    if (gone && !doubt) throw new NotHeldError(this.transactionId);
    if (!gone && reply.outcome !== ReleaseOutcome.RELEASE_OUTCOME_RELEASED) throw unspecified("release");
  }

  /** Extend the claim to `ttlMs` from now; never shortens it. Throws NotHeldError or UnavailableError. */
  async extend(ttlMs?: number, options: CallOptions = {}): Promise<void> {
    const request = ExtendTransactionRequest.fromPartial({ ...this.held(), ...encodeExpiry({ ttlMs }) });
    if (this.holdsNothing()) return;
    const { reply } = await this.channel.call(DedupServiceService.extendTransaction, () => request, this.within(options));
    if (reply.outcome === ExtendOutcome.EXTEND_OUTCOME_NOT_HELD) throw new NotHeldError(this.transactionId);
    if (reply.outcome !== ExtendOutcome.EXTEND_OUTCOME_EXTENDED) throw unspecified("extension");
    this.update(reply.transaction);
  }

  private held() {
    return { transactionId: this.transactionId, namespace: this.namespace, claimToken: this.token };
  }

  private holdsNothing(): boolean {
    return this.failOpen || this.shadowDuplicate;
  }

  private within({ timeoutMs, signal }: CallOptions): Budget {
    return { ...this.budget, timeoutMs: timeoutMs ?? this.budget.timeoutMs, signal };
  }

  private update(message: Parameters<typeof transactionFrom>[0] | undefined): void {
    if (message !== undefined) this.transaction = transactionFrom(message);
  }
}
