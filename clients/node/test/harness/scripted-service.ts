import { Metadata, Server, ServerCredentials, status, type handleUnaryCall } from "@grpc/grpc-js";
import {
  ClaimTransactionRequest,
  ClaimTransactionResponse,
  DedupServiceService,
} from "../../src/gen/dedup/v1/dedup.js";
import { encodeDuration } from "../../src/encoding.js";
import { ErrorInfo, RetryInfo } from "../../src/gen/google/rpc/error_details.js";
import { Status } from "../../src/gen/google/rpc/status.js";

/** The answer to a claim: a reply or an error. */
export type Scripted = Partial<ClaimTransactionResponse> | Refusal;

/** An error with the details of the real service, or without, as from gRPC. */
export interface Refusal {
  code: status;
  reason?: string;
  applied?: string;
  retryAfterMs?: number;
  correlationId?: string;
}

/** A service with scripted answers that the real one rarely gives; the last answer repeats. */
export class ScriptedService implements Disposable {
  readonly requests: ClaimTransactionRequest[] = [];
  address = "";
  private readonly server = new Server();

  private constructor(private readonly answers: Scripted[]) {}

  /** Start on a free port. */
  static async start(...answers: Scripted[]): Promise<ScriptedService> {
    const service = new ScriptedService(answers);
    const claimTransaction: handleUnaryCall<ClaimTransactionRequest, ClaimTransactionResponse> = (call, callback) => {
      service.requests.push(call.request);
      const answer = service.next();
      if ("code" in answer) callback({ code: answer.code, details: "scripted", metadata: detailsOf(answer) });
      else callback(null, ClaimTransactionResponse.fromPartial(answer));
    };
    service.server.addService({ claimTransaction: DedupServiceService.claimTransaction }, { claimTransaction });
    const port = await new Promise<number>((resolve, reject) => {
      const bound = (error: Error | null, port: number) => (error === null ? resolve(port) : reject(error));
      service.server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), bound);
    });
    service.address = `127.0.0.1:${port}`;
    return service;
  }

  [Symbol.dispose](): void {
    this.server.forceShutdown();
  }

  private next(): Scripted {
    return (this.answers.length > 1 ? this.answers.shift() : this.answers[0]) ?? {};
  }
}

function detailsOf({ code, reason, applied = "no", retryAfterMs, correlationId }: Refusal): Metadata {
  const metadata = new Metadata();
  if (correlationId !== undefined) metadata.set("x-correlation-id", correlationId);
  if (reason === undefined) return metadata;
  const info = ErrorInfo.fromPartial({ reason, domain: "dedup.v1", metadata: { applied } });
  const details = [{ typeUrl: "type.googleapis.com/google.rpc.ErrorInfo", value: bytes(ErrorInfo.encode(info)) }];
  if (retryAfterMs !== undefined) {
    const retry = RetryInfo.fromPartial({ retryDelay: encodeDuration("retry_delay", retryAfterMs) });
    details.push({ typeUrl: "type.googleapis.com/google.rpc.RetryInfo", value: bytes(RetryInfo.encode(retry)) });
  }
  metadata.set("grpc-status-details-bin", bytes(Status.encode(Status.fromPartial({ code, details }))));
  return metadata;
}

function bytes(writer: { finish(): Uint8Array }): Buffer {
  return Buffer.from(writer.finish());
}
