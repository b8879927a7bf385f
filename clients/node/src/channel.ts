import { Client as GrpcClient, Metadata, credentials as grpcCredentials } from "@grpc/grpc-js";
import type { ChannelCredentials, ChannelOptions, MethodDefinition } from "@grpc/grpc-js";
import { errorFrom } from "./failure.js";
import { withRetries, type Attempt } from "./retry.js";

const CHANNEL_OPTIONS: ChannelOptions = {
  // gRPC's own retries would ignore this client's token and budget.
  "grpc.enable_retries": 0,
  // A service config from DNS could enable retries or hedging again.
  "grpc.service_config_disable_resolution": 1,
  // No HTTP proxy is between a sidecar and its caller.
  "grpc.enable_http_proxy": 0,
  // gRPC's default reconnect backoff grows to two minutes.
  "grpc.initial_reconnect_backoff_ms": 50,
  "grpc.max_reconnect_backoff_ms": 1000,
};

/** The time limits of one logical call. */
export interface Budget {
  /** Limits the call with its retries. */
  timeoutMs: number;
  /** Limits one attempt. */
  attemptTimeoutMs: number;
  /** Asked of the service; added to both limits. */
  waitMs?: number;
  signal?: AbortSignal | undefined;
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
}

/** The connection to the service. A logical call makes several attempts within one budget. */
export class Channel {
  private readonly grpc: GrpcClient;

  constructor(target: string, credentials: ChannelCredentials | undefined, options: ChannelOptions | undefined) {
    this.grpc = new GrpcClient(target, credentials ?? grpcCredentials.createInsecure(), {
      ...CHANNEL_OPTIONS,
      ...options,
    });
  }

  /** Retry until a reply arrives or the budget ends; `request` makes the request of each attempt. */
  async call<Request, Reply>(
    method: MethodDefinition<Request, Reply>,
    request: (attempt: RequestAttempt) => Request,
    budget: Budget,
  ): Promise<Answer<Reply>> {
    const { timeoutMs, attemptTimeoutMs, waitMs = 0, signal } = budget;
    // Without a deadline, a lost call would never end.
    if (!(timeoutMs >= 0 && attemptTimeoutMs >= 0 && timeoutMs + attemptTimeoutMs + waitMs < Infinity)) {
      throw new RangeError("timeouts must be finite and not negative");
    }
    return withRetries(timeoutMs + waitMs, signal, async ({ leftMs, doubt }: Attempt) => {
      // The wait shrinks with time, so the timeout stays available for attempts.
      const waitLeft = Math.floor(Math.max(0, Math.min(waitMs, leftMs - timeoutMs)));
      const limitMs = Math.floor(Math.min(leftMs, waitLeft + attemptTimeoutMs));
      return { reply: await this.attempt(method, request({ waitMs: waitLeft }), limitMs, signal), doubt };
    });
  }

  /** Close the connection; in-flight calls fail. */
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
          else reject(new Error("gRPC returned neither a reply nor an error"));
        },
      );
      signal?.addEventListener("abort", abort);
    });
  }
}
