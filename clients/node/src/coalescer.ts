import { AsyncResource } from "node:async_hooks";
import { status } from "@grpc/grpc-js";
import type { AttemptOptions, Transport } from "./channel.js";
import { InvalidRequestError, UnavailableError } from "./errors.js";
import { errorFromStatus } from "./failure.js";
import { BATCH_TIMEOUT_SHARE, Gathering, MAX_CLAIM_BYTES, MAX_DELAY_MS, type GatheredCall } from "./gathering.js";
import {
  BatchClaimTransactionsRequest,
  ClaimTransactionRequest,
  ClaimTransactionResponse,
  DedupServiceService,
  type BatchClaimTransactionsResponse,
} from "./gen/dedup/v1/dedup.js";

/** The answer to a claim: of its batch, or that it is to be sent alone, also `after` a batch that failed. */
type Answer = { reply: ClaimTransactionResponse } | { error: unknown } | { alone: true; after?: Error };

interface Entry {
  readonly request: ClaimTransactionRequest;
  /** When its attempt ends. */
  readonly endsAt: number;
  /** The call it left in. */
  call?: GatheredCall<Entry>;
  /** False after its caller has left. */
  present: boolean;
  settle(answer: Answer): void;
  /** Called when its caller leaves. */
  left?(): void;
}

/**
 * Sends claims that find others in flight in batches.
 *
 * It works below the retries: every attempt keeps its own token, deadline and error.
 */
export class Coalescer {
  readonly #transport: Transport;
  readonly #batchTimeoutMs: number;
  readonly #gathering = new Gathering<Entry>();
  // A batch has no caller's context.
  readonly #outside = new AsyncResource("DedupBatch");
  #timer: NodeJS.Timeout | undefined;
  #settling = false;

  constructor(
    transport: Transport,
    attemptTimeoutMs: number,
    private readonly delayMs = MAX_DELAY_MS,
  ) {
    this.#transport = transport;
    this.#batchTimeoutMs = attemptTimeoutMs * BATCH_TIMEOUT_SHARE;
  }

  /** Make one attempt of a claim. */
  async claim(request: ClaimTransactionRequest, options: AttemptOptions): Promise<ClaimTransactionResponse> {
    const now = performance.now();
    if (!this.#mayGather(request, options) || !this.#gathering.admits(now)) return this.#alone(request, options);
    const { limitMs, signal } = options;
    const endsAt = now + limitMs;
    const entry: Entry = { request, endsAt, present: true, settle: () => undefined };
    const answered = new Promise<Answer>((resolve) => (entry.settle = resolve));
    const leave = () => this.#leave(entry, signal!.reason);
    signal?.addEventListener("abort", leave);
    this.#add(entry);
    const answer = await answered;
    signal?.removeEventListener("abort", leave);
    if ("reply" in answer) return answer.reply;
    if ("error" in answer) throw answer.error;
    try {
      signal?.throwIfAborted();
      return await this.#alone(request, { ...options, limitMs: Math.max(0, endsAt - performance.now()) });
    } catch (error) {
      throw answer.after === undefined ? error : doubted(answer.after, error);
    } finally {
      if (answer.after === undefined) this.#ended(entry.call!);
    }
  }

  /** Whether nothing about a claim is lost in a batch, and nothing of it harms the others. */
  #mayGather(request: ClaimTransactionRequest, { again, limitMs, metadata }: AttemptOptions): boolean {
    return (
      !again &&
      limitMs >= this.#batchTimeoutMs &&
      request.wait === undefined &&
      metadata === undefined &&
      !inSampledSpan() &&
      ClaimTransactionRequest.encode(request).finish().length <= MAX_CLAIM_BYTES
    );
  }

  #alone(request: ClaimTransactionRequest, options: AttemptOptions): Promise<ClaimTransactionResponse> {
    return this.#transport.send(DedupServiceService.claimTransaction, request, options);
  }

  #add(entry: Entry): void {
    let call = this.#gathering.add(entry);
    if (call === undefined && !this.#gathering.crowded) {
      if (this.#gathering.together) {
        // Callers answered together mostly claim again in the same turn of the event loop.
        if (!this.#settling) setImmediate(() => this.#settle());
        this.#settling = true;
        return;
      }
      call = this.#gathering.settle();
    }
    this.#start(call);
  }

  #settle(): void {
    this.#settling = false;
    this.#start(this.#gathering.settle());
  }

  #ended(call: GatheredCall<Entry>, failed = false): void {
    this.#start(this.#gathering.ended(call, performance.now(), failed));
  }

  #leave(entry: Entry, reason: unknown): void {
    entry.present = false;
    if (entry.call === undefined) {
      const { waiting } = this.#gathering;
      waiting.splice(waiting.indexOf(entry), 1);
      this.#start(undefined);
    }
    // Without effect on one that is about to send its claim alone.
    entry.settle({ error: reason });
    entry.left?.();
  }

  /** Make a call, and limit the wait of the claims left. */
  #start(call: GatheredCall<Entry> | undefined): void {
    if (call !== undefined) {
      for (const entry of call.claims) entry.call = call;
      if (call.claims.length === 1) call.claims[0]!.settle({ alone: true });
      else this.#outside.runInAsyncScope(() => void this.#send(call));
    }
    if (this.#gathering.waiting.length === 0) {
      clearTimeout(this.#timer);
      this.#timer = undefined;
    } else {
      this.#timer ??= setTimeout(() => {
        this.#timer = undefined;
        this.#start(this.#gathering.expired());
      }, this.delayMs);
    }
  }

  async #send(call: GatheredCall<Entry>): Promise<void> {
    const { claims } = call;
    const allLeft = new AbortController();
    for (const entry of claims) {
      entry.left = () => {
        if (claims.every(({ present }) => !present)) allLeft.abort();
      };
    }
    let answers: Answer[];
    let failed = false;
    try {
      // The service must not work for a caller that has timed out.
      const earliest = claims.reduce((end, { endsAt }) => Math.min(end, endsAt), Infinity);
      const reply = await this.#transport.send(
        DedupServiceService.batchClaimTransactions,
        BatchClaimTransactionsRequest.fromPartial({ requests: claims.map(({ request }) => request) }),
        { limitMs: Math.min(this.#batchTimeoutMs, earliest - performance.now()), signal: allLeft.signal },
      );
      answers = answersOf(reply, claims.length);
    } catch (error) {
      failed = isFaultOfBatch(error);
      answers = claims.map(() => (failed ? { alone: true, after: error as Error } : { error }));
    }
    this.#ended(call, failed);
    claims.forEach((entry, index) => entry.settle(answers[index]!));
  }
}

/** Whether a claim alone may succeed at once. Otherwise each claim is repeated by the rules of retries. */
function isFaultOfBatch(error: unknown): boolean {
  if (error instanceof InvalidRequestError) return true;
  if (!(error instanceof UnavailableError) || error.retryAfterMs !== undefined) return false;
  return error.code !== status.UNAVAILABLE && error.code !== status.CANCELLED;
}

/** Return the error of a claim whose batch failed before: the batch may have made it. */
function doubted(batch: Error, error: unknown): unknown {
  if (!(error instanceof UnavailableError) || !(batch instanceof UnavailableError) || batch.applied === "no") return error;
  const { code, reason, retryAfterMs, cause } = error;
  return new UnavailableError(error.message, { code, reason, retryAfterMs, applied: "unknown" }, { cause });
}

function answersOf({ entries }: BatchClaimTransactionsResponse, claims: number): Answer[] {
  if (entries.length !== claims) {
    throw new UnavailableError(`the dedup service answered ${claims} claims with ${entries.length} entries`, {
      code: status.INTERNAL,
      reason: "",
      applied: "unknown",
    });
  }
  // An empty entry has no outcome, which is an error.
  return entries.map(({ error, response }) =>
    error === undefined ? { reply: response ?? ClaimTransactionResponse.fromPartial({}) } : { error: errorFromStatus(error) },
  );
}

interface OpenTelemetry {
  context?: { active(): { getValue(key: symbol): { spanContext(): { traceFlags: number } } | undefined } };
}

// Where @opentelemetry/api 1.x, which this client does not depend on, keeps its state and the current span.
const OPEN_TELEMETRY = Symbol.for("opentelemetry.js.api.1");
const SPAN = Symbol.for("OpenTelemetry Context Key SPAN");

/** Instrumentation of gRPC continues the trace of the current span, and a batch has no caller's context. */
function inSampledSpan(): boolean {
  const api = (globalThis as { [OPEN_TELEMETRY]?: OpenTelemetry })[OPEN_TELEMETRY];
  const span = api?.context?.active().getValue(SPAN);
  return span !== undefined && (span.spanContext().traceFlags & 1) === 1;
}
