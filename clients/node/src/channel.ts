import { Client as GrpcClient, Metadata, credentials as grpcCredentials } from "@grpc/grpc-js";
import type { ChannelCredentials, ChannelOptions, MethodDefinition } from "@grpc/grpc-js";
import type { Coalescer } from "./coalescer.js";
import { ClientClosedError } from "./errors.js";
import { errorFrom } from "./failure.js";
import { DedupServiceService, type ClaimTransactionRequest } from "./gen/dedup/v1/dedup.js";
import { systemTimers, type Timers } from "./keep-alive.js";
import type { CallMetadata } from "./options.js";
import { systemClock, withRetries, type Attempt, type Clock } from "./retry.js";

const CHANNEL_OPTIONS: ChannelOptions = {
  // gRPC's own retries would ignore this client's token and budget.
  "grpc.enable_retries": 0,
  // A service config from DNS could enable retries or hedging again.
  "grpc.service_config_disable_resolution": 1,
  // Spreads calls over all addresses of a target, and moves on when one stops.
  "grpc.service_config": JSON.stringify({ loadBalancingConfig: [{ round_robin: {} }] }),
  // No HTTP proxy is between a sidecar and its caller.
  "grpc.enable_http_proxy": 0,
  // gRPC's default reconnect backoff grows to two minutes.
  "grpc.initial_reconnect_backoff_ms": 50,
  "grpc.max_reconnect_backoff_ms": 1000,
  // 1,000 duplicates with results of 4,096 bytes exceed gRPC's default of 4 MiB.
  "grpc.max_receive_message_length": 8 * 1024 * 1024,
};

/** The limits and the metadata of one logical call. */
export interface Budget {
  /** Limits the call with its retries. */
  timeoutMs: number;
  /** Limits one attempt. */
  attemptTimeoutMs: number;
  /** Asked of the service; added to both limits. */
  waitMs?: number;
  signal?: AbortSignal | undefined;
  metadata?: CallMetadata | undefined;
}

/** The input of a request in each attempt. */
export interface RequestAttempt {
  /** The rest of the wait. */
  waitMs: number;
}

/** A reply; `doubt` is true if an earlier attempt may have been applied. */
export interface Answer<Reply> {
  reply: Reply;
  doubt: boolean;
  /** When the answered attempt was sent, by the clock of the timers. */
  sentAt: number;
}

/** The limits of one attempt. */
export interface AttemptOptions {
  limitMs: number;
  signal?: AbortSignal | undefined;
  metadata?: CallMetadata | undefined;
  /** Whether it repeats an attempt that failed. */
  again?: boolean;
}

/** Makes single attempts. */
export interface Transport {
  /** Throws the client's errors, or the reason of the signal. */
  send<Request, Reply>(
    method: MethodDefinition<Request, Reply>,
    request: Request,
    options: AttemptOptions,
  ): Promise<Reply>;
  /** In-flight attempts fail. */
  close(): void;
}

/** Calls the service. A logical call makes several attempts within one budget. */
export class Channel {
  readonly #transport: Transport;
  readonly #clock: Clock;
  readonly #coalescer: Coalescer | undefined;
  readonly timers: Timers;
  #closed = false;

  constructor(transport: Transport, coalescer?: Coalescer, clock: Clock = systemClock, timers: Timers = systemTimers) {
    this.#transport = transport;
    this.#clock = clock;
    this.timers = timers;
    this.#coalescer = coalescer;
  }

  /** Retry until a reply arrives or the budget ends; `request` makes the request of each attempt. */
  async call<Request, Reply>(
    method: MethodDefinition<Request, Reply>,
    request: (attempt: RequestAttempt) => Request,
    budget: Budget,
  ): Promise<Answer<Reply>> {
    const { timeoutMs, attemptTimeoutMs, waitMs = 0, signal, metadata } = budget;
    // Without a deadline, a lost call would never end.
    if (!(timeoutMs >= 0 && attemptTimeoutMs >= 0 && timeoutMs + attemptTimeoutMs + waitMs < Infinity)) {
      throw new RangeError("timeouts must be finite and not negative");
    }
    const attempt = async ({ leftMs, doubt, again }: Attempt) => {
      // The wait shrinks with time, so the timeout stays available for attempts.
      const waitLeft = Math.floor(Math.max(0, Math.min(waitMs, leftMs - timeoutMs)));
      const limitMs = Math.floor(Math.min(leftMs, waitLeft + attemptTimeoutMs));
      this.#requireOpen();
      const made = request({ waitMs: waitLeft });
      const sentAt = this.timers.now();
      return { reply: await this.attempt(method, made, { limitMs, signal, metadata, again }), doubt, sentAt };
    };
    return withRetries(timeoutMs + waitMs, signal, attempt, this.#clock);
  }

  /** Make one attempt. */
  async attempt<Request, Reply>(
    method: MethodDefinition<Request, Reply>,
    request: Request,
    options: AttemptOptions,
  ): Promise<Reply> {
    this.#requireOpen();
    try {
      if (this.#coalescer === undefined || method.path !== DedupServiceService.claimTransaction.path) {
        return await this.#transport.send(method, request, options);
      }
      return (await this.#coalescer.claim(request as ClaimTransactionRequest, options)) as Reply;
    } catch (error) {
      this.#requireOpen();
      throw error;
    }
  }

  /** Close the connection for good; in-flight calls fail. */
  close(): void {
    this.#closed = true;
    this.#transport.close();
  }

  #requireOpen(): void {
    if (this.#closed) throw new ClientClosedError();
  }
}

/** A connection of grpc-js. */
export class GrpcTransport implements Transport {
  readonly #grpc: GrpcClient;
  readonly #cancels = new Set<() => void>();

  constructor(target: string, credentials: ChannelCredentials | undefined, options: ChannelOptions | undefined) {
    this.#grpc = new GrpcClient(target, credentials ?? grpcCredentials.createInsecure(), {
      ...CHANNEL_OPTIONS,
      ...options,
    });
  }

  send<Request, Reply>(
    method: MethodDefinition<Request, Reply>,
    request: Request,
    { limitMs, signal, metadata }: AttemptOptions,
  ): Promise<Reply> {
    return new Promise((resolve, reject) => {
      const abort = () => call.cancel();
      const call = this.#grpc.makeUnaryRequest(
        method.path,
        method.requestSerialize,
        method.responseDeserialize,
        request,
        metadataOf(metadata),
        { deadline: Date.now() + limitMs },
        (error, reply) => {
          signal?.removeEventListener("abort", abort);
          this.#cancels.delete(abort);
          if (error === null && reply !== undefined) resolve(reply);
          else if (signal?.aborted) reject(signal.reason);
          else if (error !== null) reject(errorFrom(error));
          else reject(new Error("gRPC returned neither a reply nor an error"));
        },
      );
      this.#cancels.add(abort);
      signal?.addEventListener("abort", abort);
    });
  }

  close(): void {
    // grpc-js would let calls on an open connection go on.
    for (const cancel of this.#cancels) cancel();
    this.#grpc.close();
  }
}

function metadataOf(entries: CallMetadata | undefined): Metadata {
  if (entries instanceof Metadata) return entries;
  const metadata = new Metadata();
  for (const [name, value] of Object.entries(entries ?? {})) metadata.set(name, value);
  return metadata;
}
