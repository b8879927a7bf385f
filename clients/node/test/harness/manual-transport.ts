import type { AttemptOptions, Transport } from "../../src/channel.js";
import {
  BatchClaimTransactionsResponse,
  ClaimOutcome,
  ClaimTransactionResponse,
  type BatchClaimTransactionsRequest,
  type ClaimTransactionRequest,
} from "../../src/gen/dedup/v1/dedup.js";

export const CLAIMED = ClaimTransactionResponse.fromPartial({ outcome: ClaimOutcome.CLAIM_OUTCOME_CLAIMED });

/** A transport whose calls are answered by the test. */
export class ManualTransport implements Transport {
  readonly calls: { method: string; request: unknown; options: AttemptOptions; answer: (reply: unknown) => void }[] = [];
  send<Request, Reply>(method: { path: string }, request: Request, options: AttemptOptions): Promise<Reply> {
    return new Promise((resolve, reject) => {
      options.signal?.addEventListener("abort", () => reject(options.signal!.reason));
      const answer = (reply: unknown) => (reply instanceof Error ? reject(reply) : resolve(reply as Reply));
      this.calls.push({ method: method.path.split("/").at(-1)!, request, options, answer });
    });
  }
  close(): void {}
  /** Answer a batch: CLAIMED for each entry, or what `of` returns. */
  answerBatch(index: number, of: (request: ClaimTransactionRequest) => object = () => ({ response: CLAIMED })): void {
    const { requests } = this.calls[index]!.request as BatchClaimTransactionsRequest;
    this.calls[index]!.answer(BatchClaimTransactionsResponse.fromPartial({ entries: requests.map(of) }));
  }
}
