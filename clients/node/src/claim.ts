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

/** How a claim was granted. */
export interface Grant {
  transactionId: string;
  /** Empty where the service chooses. */
  namespace: string;
  token: string;
  /** The claim was made by an earlier call with the same token: this is the answer that the caller did not hear. */
  replayed: boolean;
  /** The service could not be asked and `onUnavailable` is "allow": nothing is held, and others may be told the same. */
  failOpen: boolean;
  /** The namespace is in shadow mode and somebody else holds the transaction: go, and nothing is held. */
  shadowDuplicate: boolean;
  /** The transaction as the store has it, the holder's for a shadow duplicate; undefined for a fail-open grant. */
  transaction: Transaction | undefined;
}

/**
 * The right to do the work of one transaction.
 *
 * Complete it when the work is done, and release it when the work certainly did not happen. Work that may have been
 * done is left to expire. Where nothing is held (`failOpen`, `shadowDuplicate`) both do nothing, and so does `extend`.
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

  /** @internal Claims are made by a client. */
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

  /** Whether this handle was asked to complete or to release it, whatever came of that. */
  get ended(): boolean {
    return this.#ended;
  }

  /**
   * Reports the work as done, and keeps its result for later duplicates.
   *
   * The result has at most 4,096 bytes unless the service is configured otherwise. May be repeated with the same
   * result. Throws NotHeldError, UnavailableError or InvalidRequestError.
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

  /** Gives the claim back, so that the next caller may have it at once; throws NotHeldError or UnavailableError. */
  async release(options: CallOptions = {}): Promise<void> {
    this.#ended = true;
    if (this.holdsNothing()) return;
    const request = ReleaseTransactionRequest.fromPartial(this.held());
    const { reply, doubt } = await this.channel.call(
      DedupServiceService.releaseTransaction,
      () => request,
      this.within(options),
    );
    // After a lost reply "not held" is what our own release looks like, and either way nothing is held any more.
    const gone = reply.outcome === ReleaseOutcome.RELEASE_OUTCOME_NOT_HELD;
    if (gone && !doubt) throw new NotHeldError(this.transactionId);
    if (!gone && reply.outcome !== ReleaseOutcome.RELEASE_OUTCOME_RELEASED) throw unspecified("release");
  }

  /** Asks for `ttlMs` from now on, never for less than is left; throws NotHeldError or UnavailableError. */
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
