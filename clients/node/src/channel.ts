import { Client as GrpcClient, Metadata, credentials as grpcCredentials } from "@grpc/grpc-js";
import type { ChannelCredentials, ChannelOptions, MethodDefinition } from "@grpc/grpc-js";
import { errorFrom } from "./failure.js";
import { withRetries, type Attempt } from "./retry.js";

const CHANNEL_OPTIONS: ChannelOptions = {
  // Retries are made here, with one token and one budget. gRPC's own would know neither.
  "grpc.enable_retries": 0,
  // Nor may a service config from DNS turn them, or hedging, on again.
  "grpc.service_config_disable_resolution": 1,
  // The service runs beside its caller: a proxy for the Internet is not on the way to it.
  "grpc.enable_http_proxy": 0,
  // By default up to two minutes pass before a restarted service is tried again.
  "grpc.initial_reconnect_backoff_ms": 50,
  "grpc.max_reconnect_backoff_ms": 1000,
};

/** How long one logical call may take. */
export interface Budget {
  /** The whole of it, with its retries. */
  timeoutMs: number;
  /** One attempt. */
  attemptTimeoutMs: number;
  /** By how much more the service was asked to wait. */
  waitMs?: number;
  signal?: AbortSignal | undefined;
}

/** One attempt as its request is made. */
export interface RequestAttempt {
  /** How much of the wait is left. */
  waitMs: number;
}

/** A reply, and whether an attempt before it may have been applied. */
export interface Answer<Reply> {
  reply: Reply;
  doubt: boolean;
}

/** The connection to the service: one logical call is several attempts within one budget. */
export class Channel {
  private readonly grpc: GrpcClient;

  constructor(target: string, credentials: ChannelCredentials | undefined, options: ChannelOptions | undefined) {
    this.grpc = new GrpcClient(target, credentials ?? grpcCredentials.createInsecure(), {
      ...CHANNEL_OPTIONS,
      ...options,
    });
  }

  /** Asks until there is an answer or the budget is used up; `request` makes each attempt's own. */
  async call<Request, Reply>(
    method: MethodDefinition<Request, Reply>,
    request: (attempt: RequestAttempt) => Request,
    budget: Budget,
  ): Promise<Answer<Reply>> {
    const { timeoutMs, attemptTimeoutMs, waitMs = 0, signal } = budget;
    // Without an end in sight there would be no deadline, and a call that is lost would never end.
    if (!(timeoutMs >= 0 && attemptTimeoutMs >= 0 && timeoutMs + attemptTimeoutMs + waitMs < Infinity)) {
      throw new RangeError("time-outs must be finite and not negative");
    }
    return withRetries(timeoutMs + waitMs, signal, async ({ leftMs, doubt }: Attempt) => {
      // The wait shrinks as time passes, and what the caller allows besides is kept for asking.
      const waitLeft = Math.floor(Math.max(0, Math.min(waitMs, leftMs - timeoutMs)));
      const limitMs = Math.floor(Math.min(leftMs, waitLeft + attemptTimeoutMs));
      return { reply: await this.attempt(method, request({ waitMs: waitLeft }), limitMs, signal), doubt };
    });
  }

  /** Ends the connection; calls under way fail. */
  close(): void {
    this.grpc.close();
  }

  private attempt<Request, Reply>(
    method: MethodDefinition<Request, Reply>,
    request: Request,
    limitMs: number,
    signal: AbortSignal | undefined,
  ): Promise<Reply> {
    return new Promise((resolve, reject) => {
      const abort = () => call.cancel();
      const call = this.grpc.makeUnaryRequest(
        method.path,
        method.requestSerialize,
        method.responseDeserialize,
        request,
        new Metadata(),
        { deadline: Date.now() + limitMs },
        (error, reply) => {
          signal?.removeEventListener("abort", abort);
          if (error === null && reply !== undefined) resolve(reply);
          else if (signal?.aborted) reject(signal.reason);
          else if (error !== null) reject(errorFrom(error));
          else reject(new Error("gRPC answered with neither a reply nor an error"));
        },
      );
      signal?.addEventListener("abort", abort);
    });
  }
}
