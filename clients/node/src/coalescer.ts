import { status } from "@grpc/grpc-js";
import type { AttemptOptions, Transport } from "./channel.js";
import { UnavailableError } from "./errors.js";
import { errorFromStatus } from "./failure.js";
import {
  BatchClaimTransactionsRequest,
  ClaimTransactionResponse,
  DedupServiceService,
  type BatchClaimTransactionsResponse,
  type ClaimTransactionRequest,
} from "./gen/dedup/v1/dedup.js";

const MAX_BATCH = 1000;
/** How long a claim waits for the one in flight. */
const MAX_DELAY_MS = 2;

interface Entry {
  request: ClaimTransactionRequest;
  /** When its attempt ends. */
  endsAt: number;
  /** False after its caller has left. */
  waiting: boolean;
  settle(answer: ClaimTransactionResponse | Error): void;
  /** Called when the caller leaves. */
  left: () => void;
}

/**
 * Sends a claim alone if no other is in flight, and otherwise in the next batch.
 *
 * It works below the retries: every attempt keeps its own token, deadline and error.
 */
export class Coalescer {
  readonly #transport: Transport;
  #pending: Entry[] = [];
  #inFlight = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor(transport: Transport) {
    this.#transport = transport;
  }

  /** Make one attempt of a claim. */
  claim(request: ClaimTransactionRequest, { limitMs, signal }: AttemptOptions): Promise<ClaimTransactionResponse> {
    if (this.#inFlight === 0) return this.#alone(request, { limitMs, signal });
    return new Promise((resolve, reject) => {
      const leave = (reason: unknown) => {
        entry.waiting = false;
        settled();
        reject(reason);
        entry.left();
      };
      const aborted = () => leave(signal!.reason);
      const timer = setTimeout(() => leave(timedOut(limitMs)), limitMs);
      const settled = () => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", aborted);
      };
      const entry: Entry = {
        request,
        endsAt: performance.now() + limitMs,
        waiting: true,
        settle: (answer) => {
          settled();
          if (answer instanceof Error) reject(answer);
          else resolve(answer);
        },
        left: () => undefined,
      };
      signal?.addEventListener("abort", aborted);
      this.#pending.push(entry);
      if (this.#pending.length >= MAX_BATCH) this.#flush();
      else this.#timer ??= setTimeout(() => this.#flush(), MAX_DELAY_MS);
    });
  }

  async #alone(request: ClaimTransactionRequest, options: AttemptOptions): Promise<ClaimTransactionResponse> {
    this.#inFlight++;
    try {
      return await this.#transport.send(DedupServiceService.claimTransaction, request, options);
    } finally {
      this.#answered();
    }
  }

  #answered(): void {
    this.#inFlight--;
    this.#flush();
  }

  #flush(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    // Nobody would hold the claim of a caller that has left.
    const batch = this.#pending.filter((entry) => entry.waiting);
    this.#pending = [];
    if (batch.length > 0) void this.#send(batch);
  }

  async #send(batch: Entry[]): Promise<void> {
    this.#inFlight++;
    const allLeft = new AbortController();
    for (const entry of batch) {
      entry.left = () => {
        if (batch.every(({ waiting }) => !waiting)) allLeft.abort();
      };
    }
    let answers: (ClaimTransactionResponse | Error)[];
    try {
      const latest = batch.reduce((end, entry) => Math.max(end, entry.endsAt), 0);
      const reply = await this.#transport.send(
        DedupServiceService.batchClaimTransactions,
        BatchClaimTransactionsRequest.fromPartial({ requests: batch.map(({ request }) => request) }),
        { limitMs: latest - performance.now(), signal: allLeft.signal },
      );
      answers = answersOf(reply, batch.length);
    } catch (error) {
      answers = batch.map(() => error as Error);
    }
    batch.forEach((entry, index) => entry.waiting && entry.settle(answers[index]!));
    this.#answered();
  }
}

function answersOf({ entries }: BatchClaimTransactionsResponse, claims: number): (ClaimTransactionResponse | Error)[] {
  if (entries.length !== claims) {
    throw new UnavailableError(`the dedup service answered ${claims} claims with ${entries.length} entries`, {
      code: status.INTERNAL,
      reason: "",
      applied: "unknown",
    });
  }
  // An empty entry has no outcome, which is an error.
  return entries.map(({ error, response }) =>
    error === undefined ? (response ?? ClaimTransactionResponse.fromPartial({})) : errorFromStatus(error),
  );
}

function timedOut(limitMs: number): UnavailableError {
  const failure = { code: status.DEADLINE_EXCEEDED, reason: "", applied: "unknown" as const };
  return new UnavailableError(`the dedup service did not answer the claim within ${limitMs} ms`, failure);
}
