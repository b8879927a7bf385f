import { status, type MethodDefinition } from "@grpc/grpc-js";
import { Channel, type AttemptOptions, type Transport } from "./channel.js";
import { Client, newToken } from "./client.js";
import { InvalidRequestError, UnavailableError, type FieldViolation } from "./errors.js";
import {
  ClaimOutcome,
  ClaimTransactionResponse,
  CompleteOutcome,
  CompleteTransactionResponse,
  DedupServiceService,
  ExtendOutcome,
  ExtendTransactionResponse,
  GetTransactionResponse,
  ReleaseOutcome,
  ReleaseTransactionResponse,
  Transaction,
  TransactionState,
  type ClaimTransactionRequest,
  type CompleteTransactionRequest,
  type ExtendTransactionRequest,
  type GetTransactionRequest,
  type ReleaseTransactionRequest,
} from "./gen/dedup/v1/dedup.js";
import type { Duration } from "./gen/google/protobuf/duration.js";
import type { Timers } from "./keep-alive.js";
import type { ClientOptions } from "./options.js";

const DEFAULT_TTL_MS = 60_000;
const DEFAULT_RETENTION_MS = 86_400_000;
const MAX_TTL_MS = 7 * 86_400_000;
const MAX_RESULT_BYTES = 4096;
const MAX_WAIT_MS = 300_000;

interface Held {
  transaction: Transaction;
  token: string;
  fingerprint: Buffer;
  expiresAt: number;
}

type HoldingRequest = CompleteTransactionRequest | ReleaseTransactionRequest | ExtendTransactionRequest;

/** The rules of a namespace, as in the policy file of the service; what is left out has the service's default. */
export interface Policy {
  /** The lifetime of a claim that asks for none. */
  defaultTtlMs?: number | undefined;
  /** The longest lifetime that a caller may ask for. */
  maxTtlMs?: number | undefined;
  /** How long a completed transaction is kept. */
  retentionMs?: number | undefined;
  /** Grant duplicates, and mark them. */
  shadow?: boolean | undefined;
}

type Rules = { [Name in keyof Policy]-?: NonNullable<Policy[Name]> };

/**
 * The service in memory, for one process.
 *
 * Its decisions, token checks, expiries and rejections are the service's. A claim with `waitMs` is answered at once.
 * Time passes only with `advance`.
 */
export class FakeService implements Transport {
  /** Rejects every call, as without a store. */
  unavailable = false;
  /** Whether namespaces without a policy are accepted, with the defaults. */
  allowUnknownNamespaces = true;
  /** The largest result of a completion. */
  maxResultBytes = MAX_RESULT_BYTES;
  /** Method and request of every attempt. */
  readonly calls: { method: string; request: object }[] = [];
  readonly #held = new Map<string, Held>();
  readonly #policies = new Map<string, Rules>();
  readonly #timers = new Map<object, { at: number; run: () => void }>();
  #lostReplies = 0;
  #now: number;

  /** Start the clock at a Unix time in milliseconds. */
  constructor(now = Date.now()) {
    this.#now = now;
  }

  /** @internal The clock of the clients. */
  get timers(): Timers {
    return {
      now: () => this.#now,
      random: () => 0,
      after: (ms, run) => {
        const timer = {};
        this.#timers.set(timer, { at: this.#now + ms, run });
        return () => void this.#timers.delete(timer);
      },
    };
  }

  /** Move the clock forward; claims that are kept alive are extended on the way. */
  async advance(ms: number): Promise<void> {
    const end = this.#now + ms;
    for (;;) {
      const [next] = [...this.#timers].filter(([, { at }]) => at <= end).sort(([, a], [, b]) => a.at - b.at);
      if (next === undefined) break;
      const [timer, { at, run }] = next;
      this.#timers.delete(timer);
      this.#now = Math.max(this.#now, at);
      run();
      // The calls that the timer started end first.
      await new Promise((resolve) => setImmediate(resolve));
    }
    this.#now = end;
  }

  /** Set the rules of a namespace. Throws RangeError if a lifetime is not positive or longer than `maxTtlMs`. */
  setPolicy(namespace: string, policy: Policy): void {
    this.#policies.set(namespace, rulesOf(policy));
  }

  /** Execute the next `count` attempts and lose their replies. */
  loseReplies(count = 1): void {
    this.#lostReplies = count;
  }

  /** @internal */
  async send<Request, Reply>(
    method: MethodDefinition<Request, Reply>,
    request: Request,
    { signal }: AttemptOptions,
  ): Promise<Reply> {
    signal?.throwIfAborted();
    this.calls.push({ method: method.path.slice(method.path.lastIndexOf("/") + 1), request: request as object });
    if (this.unavailable) {
      const failure = { code: status.UNAVAILABLE, reason: "STORE_UNREACHABLE", applied: "no" as const, retryAfterMs: 200 };
      throw new UnavailableError("the fake service is set to unavailable", failure);
    }
    const reply = this.#execute(method.path, request) as Reply;
    if (this.#lostReplies > 0) {
      this.#lostReplies--;
      const failure = { code: status.UNAVAILABLE, reason: "", applied: "unknown" as const };
      throw new UnavailableError("the reply was lost", failure);
    }
    return reply;
  }

  /** @internal A FakeService serves several clients, so it stays open. */
  close(): void {}

  #execute(path: string, request: unknown): unknown {
    switch (path) {
      case DedupServiceService.claimTransaction.path:
        return this.#claim(request as ClaimTransactionRequest);
      case DedupServiceService.completeTransaction.path:
        return this.#complete(request as CompleteTransactionRequest);
      case DedupServiceService.releaseTransaction.path:
        return this.#release(request as ReleaseTransactionRequest);
      case DedupServiceService.extendTransaction.path:
        return this.#extend(request as ExtendTransactionRequest);
      case DedupServiceService.getTransaction.path:
        return this.#get(request as GetTransactionRequest);
      default:
        throw new Error(`the fake service does not support ${path}`);
    }
  }

  #claim(request: ClaimTransactionRequest): ClaimTransactionResponse {
    const rules = this.#rules(request);
    const expiresAt = this.#expiry(request, rules.defaultTtlMs);
    refuse([...identityFaults(request), ...this.#expiryFaults(request, rules), ...claimFaults(request)]);
    const token = request.claimToken || newToken();
    const reply = (outcome: ClaimOutcome, held: Held, more: Partial<ClaimTransactionResponse> = {}) =>
      ClaimTransactionResponse.fromPartial({ outcome, transaction: held.transaction, ...more });
    const held = this.#find(request);
    if (held === undefined) {
      const made: Held = {
        transaction: Transaction.fromPartial({
          transactionId: request.transactionId,
          namespace: request.namespace || "default",
          state: TransactionState.TRANSACTION_STATE_IN_PROGRESS,
          claimant: request.claimant,
          claimTime: new Date(this.#now),
        }),
        token,
        fingerprint: request.payloadFingerprint,
        expiresAt,
      };
      this.#keep(made, expiresAt);
      return reply(ClaimOutcome.CLAIM_OUTCOME_CLAIMED, made, { claimToken: token });
    }
    const { payloadFingerprint: fingerprint } = request;
    const mismatch = fingerprint.length > 0 && held.fingerprint.length > 0 && !fingerprint.equals(held.fingerprint);
    if (!mismatch && held.token === token && isInProgress(held)) {
      return reply(ClaimOutcome.CLAIM_OUTCOME_CLAIMED, held, { claimToken: token, replayed: true });
    }
    if (rules.shadow) return reply(ClaimOutcome.CLAIM_OUTCOME_CLAIMED, held, { claimToken: token, shadowDuplicate: true });
    return reply(mismatch ? ClaimOutcome.CLAIM_OUTCOME_PAYLOAD_MISMATCH : ClaimOutcome.CLAIM_OUTCOME_DUPLICATE, held);
  }

  #complete(request: CompleteTransactionRequest): CompleteTransactionResponse {
    const rules = this.#rules(request);
    const expiresAt = this.#expiry(request, rules.retentionMs);
    const { length } = request.result;
    const limit = this.maxResultBytes;
    const faults = [...identityFaults(request), ...this.#expiryFaults(request, rules), ...tokenFaults(request)];
    if (length > limit) faults.push(fault("result", `has ${length} bytes; it must have at most ${limit}`));
    refuse(faults);
    const held = this.#find(request);
    const other = held && !isInProgress(held) && !held.transaction.result.equals(request.result);
    if (held?.token !== request.claimToken || other) {
      return CompleteTransactionResponse.fromPartial({ outcome: CompleteOutcome.COMPLETE_OUTCOME_NOT_HELD });
    }
    if (isInProgress(held!)) {
      held!.transaction.state = TransactionState.TRANSACTION_STATE_COMPLETED;
      held!.transaction.result = request.result;
      held!.transaction.completionTime = new Date(this.#now);
      this.#keep(held!, expiresAt);
    }
    const { transaction } = held!;
    return CompleteTransactionResponse.fromPartial({ outcome: CompleteOutcome.COMPLETE_OUTCOME_COMPLETED, transaction });
  }

  #release(request: ReleaseTransactionRequest): ReleaseTransactionResponse {
    this.#rules(request);
    refuse([...identityFaults(request), ...tokenFaults(request)]);
    const held = this.#findInProgress(request);
    if (held !== undefined) this.#held.delete(keyOf(request));
    const outcome = held ? ReleaseOutcome.RELEASE_OUTCOME_RELEASED : ReleaseOutcome.RELEASE_OUTCOME_NOT_HELD;
    return ReleaseTransactionResponse.fromPartial({ outcome });
  }

  #extend(request: ExtendTransactionRequest): ExtendTransactionResponse {
    const rules = this.#rules(request);
    const expiresAt = this.#expiry(request, rules.defaultTtlMs);
    refuse([...identityFaults(request), ...this.#expiryFaults(request, rules), ...tokenFaults(request)]);
    const held = this.#findInProgress(request);
    if (held === undefined) {
      return ExtendTransactionResponse.fromPartial({ outcome: ExtendOutcome.EXTEND_OUTCOME_NOT_HELD });
    }
    if (request.allowShortening || expiresAt > held.expiresAt) this.#keep(held, expiresAt);
    const { transaction } = held;
    return ExtendTransactionResponse.fromPartial({ outcome: ExtendOutcome.EXTEND_OUTCOME_EXTENDED, transaction });
  }

  #get(request: GetTransactionRequest): GetTransactionResponse {
    this.#rules(request);
    refuse(identityFaults(request));
    const held = this.#find(request);
    if (held !== undefined) return GetTransactionResponse.fromPartial({ transaction: held.transaction });
    const failure = { code: status.NOT_FOUND, reason: "TRANSACTION_NOT_FOUND", applied: "no" as const };
    throw new UnavailableError("nobody holds the transaction", failure);
  }

  /** Return the rules for a request. Throws InvalidRequestError for an unknown namespace where those are rejected. */
  #rules({ namespace }: { namespace: string }): Rules {
    const rules = this.#policies.get(namespace || "default");
    if (rules === undefined && !this.allowUnknownNamespaces) refuse([fault("namespace", "is not known here: set its policy")]);
    return rules ?? rulesOf({});
  }

  #find(request: { transactionId: string; namespace: string }): Held | undefined {
    const held = this.#held.get(keyOf(request));
    if (held === undefined || held.expiresAt > this.#now) return held;
    this.#held.delete(keyOf(request));
    return undefined;
  }

  #findInProgress(request: HoldingRequest): Held | undefined {
    const held = this.#find(request);
    return held?.token === request.claimToken && isInProgress(held) ? held : undefined;
  }

  #keep(held: Held, expiresAt: number): void {
    held.expiresAt = expiresAt;
    held.transaction.expireTime = new Date(expiresAt);
    this.#held.set(keyOf(held.transaction), held);
  }

  #expiry({ ttl, expireTime }: { ttl?: Duration | undefined; expireTime?: Date | undefined }, defaultMs: number): number {
    return expireTime?.getTime() ?? this.#now + (ttl === undefined ? defaultMs : msOf(ttl));
  }

  #expiryFaults(
    { ttl, expireTime }: { ttl?: Duration | undefined; expireTime?: Date | undefined },
    { maxTtlMs }: Rules,
  ): FieldViolation[] {
    if (ttl !== undefined && msOf(ttl) <= 0) return [fault("ttl", "must be at least 1 ms")];
    if (ttl !== undefined && msOf(ttl) > maxTtlMs) return [fault("ttl", `is longer than the maximum of ${maxTtlMs} ms`)];
    if (expireTime === undefined) return [];
    const leftMs = expireTime.getTime() - this.#now;
    if (leftMs <= 0) return [fault("expire_time", "is in the past")];
    return leftMs > maxTtlMs ? [fault("expire_time", `is later than the maximum ttl of ${maxTtlMs} ms allows`)] : [];
  }
}

/** A Client over a FakeService, in `service`. Several clients may share one. Pauses take no time, and claims are not coalesced. */
export class FakeClient extends Client {
  readonly service: FakeService;

  constructor(service = new FakeService(), options: ClientOptions = {}) {
    let paused = 0;
    const clock = { now: () => paused, random: () => 0.5, sleep: async (ms: number) => void (paused += ms) };
    super(new Channel(service, undefined, clock, service.timers), options);
    this.service = service;
  }
}

function keyOf({ namespace, transactionId }: { namespace: string; transactionId: string }): string {
  return `${namespace || "default"}:${transactionId}`;
}

/** Return a policy with the defaults of the service. Throws RangeError. */
function rulesOf({ defaultTtlMs = DEFAULT_TTL_MS, maxTtlMs = MAX_TTL_MS, retentionMs, shadow = false }: Policy): Rules {
  const rules = { defaultTtlMs, maxTtlMs, retentionMs: retentionMs ?? Math.min(DEFAULT_RETENTION_MS, maxTtlMs), shadow };
  for (const name of ["maxTtlMs", "defaultTtlMs", "retentionMs"] as const) {
    if (!(rules[name] > 0 && rules[name] <= maxTtlMs)) {
      throw new RangeError(`${name} is ${rules[name]}; it must be between 1 and maxTtlMs, ${maxTtlMs}`);
    }
  }
  return rules;
}

function isInProgress({ transaction }: Held): boolean {
  return transaction.state === TransactionState.TRANSACTION_STATE_IN_PROGRESS;
}

function msOf({ seconds, nanos }: Duration): number {
  return seconds * 1000 + Math.trunc(nanos / 1e6);
}

function fault(field: string, description: string): FieldViolation {
  return { field, description };
}

function identityFaults({ transactionId, namespace }: { transactionId: string; namespace: string }): FieldViolation[] {
  const faults: FieldViolation[] = [];
  const size = Buffer.byteLength(transactionId);
  if (size < 1 || size > 512) faults.push(fault("transaction_id", `has ${size} bytes of UTF-8; it must have 1 to 512`));
  else if (hasControl(transactionId)) faults.push(fault("transaction_id", "has a control character"));
  if (namespace !== "" && !/^[a-z0-9][a-z0-9_.-]{0,62}$/.test(namespace)) {
    faults.push(fault("namespace", "must match [a-z0-9][a-z0-9_.-]{0,62}"));
  }
  return faults;
}

function claimFaults(request: ClaimTransactionRequest): FieldViolation[] {
  const faults = request.claimToken === "" ? [] : tokenFaults(request);
  if (Buffer.byteLength(request.claimant) > 256 || hasControl(request.claimant)) {
    faults.push(fault("claimant", "must be at most 256 bytes of UTF-8 without control characters"));
  }
  const { length } = request.payloadFingerprint;
  if (length > 64) faults.push(fault("payload_fingerprint", `has ${length} bytes; it must have at most 64`));
  const waitMs = request.wait ? msOf(request.wait) : 0;
  if (waitMs < 0 || waitMs > MAX_WAIT_MS) faults.push(fault("wait", "must be 0 to 5 minutes"));
  return faults;
}

function tokenFaults({ claimToken }: { claimToken: string }): FieldViolation[] {
  return /^[\x20-\x7e]{16,64}$/.test(claimToken) ? [] : [fault("claim_token", "must be 16 to 64 printable ASCII characters")];
}

function hasControl(text: string): boolean {
  return /[\x00-\x1f\x7f-\x9f]/.test(text);
}

function refuse(faults: readonly FieldViolation[]): void {
  if (faults.length === 0) return;
  throw new InvalidRequestError(faults.map(({ field, description }) => `${field}: ${description}`).join("; "), faults);
}
