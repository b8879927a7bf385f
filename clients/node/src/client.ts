import { randomBytes } from "node:crypto";
import { status } from "@grpc/grpc-js";
import { Channel, type Budget } from "./channel.js";
import { Claim, type Grant } from "./claim.js";
import { ATTEMPT_TIMEOUT_MS, BUDGET_MS } from "./defaults.js";
import { encodeBytes, encodeDuration, encodeExpiry, encodeText } from "./encoding.js";
import { InvalidRequestError, UnavailableError } from "./errors.js";
import { isOutage } from "./failure.js";
import { ClaimTransactionRequest, DedupServiceService, GetTransactionRequest } from "./gen/dedup/v1/dedup.js";
import type { CallOptions, ClaimOptions, ClientOptions, GetOptions, Logger } from "./options.js";
import { requireClaimed } from "./outcome.js";
import { loggedId } from "./transaction-id.js";
import { transactionFrom, type Transaction } from "./transaction.js";

/** A client of the dedup service. Use one per process. */
export class Client {
  private readonly channel: Channel;
  private readonly logger: Logger;

  /** Create a client of `host:port` or `unix:///path`; it connects on the first call. */
  constructor(
    target: string,
    private readonly options: ClientOptions = {},
  ) {
    this.channel = new Channel(target, options.credentials, options.channelOptions);
    this.logger = options.logger ?? console;
  }

  /**
   * Claim a transaction: exactly one caller gets a handle, until its claim expires or is released.
   *
   * All attempts send one token, so a retry is never mistaken for a duplicate. Throws DuplicateTransactionError,
   * PayloadMismatchError, InvalidRequestError, or UnavailableError if the outcome is unknown.
   */
  async claim(transactionId: string, options: ClaimOptions = {}): Promise<Claim> {
    // No other logical call sends this token.
    const token = options.token ?? newToken();
    const namespace = options.namespace ?? this.options.namespace ?? "";
    const request = this.claimRequest(transactionId, namespace, token, options);
    const grant = { transactionId, namespace, token, replayed: false, failOpen: false, shadowDuplicate: false };
    try {
      const { reply } = await this.channel.call(
        DedupServiceService.claimTransaction,
        ({ waitMs }) => ({ ...request, wait: waitMs > 0 ? encodeDuration("wait", waitMs) : undefined }),
        { ...this.budget(options), waitMs: options.waitMs ?? 0 },
      );
      requireClaimed(reply);
      const { replayed, shadowDuplicate } = reply;
      const transaction = reply.transaction && transactionFrom(reply.transaction);
      return this.handle({ ...grant, replayed, shadowDuplicate, transaction });
    } catch (error) {
      if (!this.mayGoOn(error, options)) throw error;
      const { code, reason, applied } = error;
      const transaction = loggedId(transactionId);
      this.logger.warn("dedup service unavailable: proceeding without a claim", { transaction, code, reason, applied });
      return this.handle({ ...grant, failOpen: true, transaction: undefined });
    }
  }

  /**
   * Claim a transaction, do the work and complete it; if the work throws, release it and rethrow the error.
   *
   * The work may complete the claim itself, to keep a result. Use `claim` if work that throws may have taken effect.
   * The signal applies to the claim only. Throws the errors of `claim`, `work` and `complete`; after the last, the work
   * is done but not recorded.
   */
  async once<T>(
    transactionId: string,
    options: ClaimOptions,
    work: (claim: Claim) => T | PromiseLike<T>,
  ): Promise<T> {
    const claim = await this.claim(transactionId, options);
    let value: T;
    try {
      value = await work(claim);
    } catch (error) {
      // After a failed completion the work is done: do not release it.
      if (!claim.ended) await this.giveBack(claim);
      throw error;
    }
    if (!claim.ended) await claim.complete();
    return value;
  }

  /** Read a transaction without changing it; undefined if nobody holds it. Throws UnavailableError. */
  async get(transactionId: string, options: GetOptions = {}): Promise<Transaction | undefined> {
    const request = GetTransactionRequest.fromPartial({
      transactionId: encodeText("transaction_id", transactionId),
      namespace: encodeText("namespace", options.namespace ?? this.options.namespace ?? ""),
    });
    try {
      const { reply } = await this.channel.call(DedupServiceService.getTransaction, () => request, this.budget(options));
      return reply.transaction && transactionFrom(reply.transaction);
    } catch (error) {
      const absent = error instanceof UnavailableError && error.reason === "TRANSACTION_NOT_FOUND";
      if (absent && error.code === status.NOT_FOUND) return undefined;
      throw error;
    }
  }

  /** Close the connection; in-flight calls fail. */
  close(): void {
    this.channel.close();
  }

  private claimRequest(transactionId: string, namespace: string, token: string, options: ClaimOptions) {
    // The service would create a token per attempt, and a retry would be a duplicate.
    if (token === "") throw InvalidRequestError.of("claim_token", "must not be empty");
    if (options.waitMs !== undefined && options.waitMs < 0) throw InvalidRequestError.of("wait", "must not be negative");
    encodeDuration("wait", options.waitMs ?? 0);
    return ClaimTransactionRequest.fromPartial({
      transactionId: encodeText("transaction_id", transactionId),
      namespace: encodeText("namespace", namespace),
      claimToken: encodeText("claim_token", token),
      claimant: encodeText("claimant", options.claimant ?? this.options.claimant ?? ""),
      payloadFingerprint: encodeBytes("payload_fingerprint", options.fingerprint ?? ""),
      ...encodeExpiry(options),
    });
  }

  private mayGoOn(error: unknown, options: ClaimOptions): error is UnavailableError {
    const policy = options.onUnavailable ?? this.options.onUnavailable ?? "deny";
    return policy === "allow" && error instanceof UnavailableError && isOutage(error);
  }

  private async giveBack(claim: Claim): Promise<void> {
    try {
      await claim.release();
    } catch (error) {
      // The caller receives the work's error, and the claim expires.
      this.logger.warn("dedup claim not released", { transaction: loggedId(claim.transactionId), ...summary(error) });
    }
  }

  private handle(grant: Grant): Claim {
    return new Claim(this.channel, this.budget({}), grant);
  }

  private budget({ timeoutMs = this.options.timeoutMs ?? BUDGET_MS, signal }: CallOptions): Budget {
    return { timeoutMs, attemptTimeoutMs: this.options.attemptTimeoutMs ?? ATTEMPT_TIMEOUT_MS, signal };
  }
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
