import type { IncomingMessage } from "node:http";
import type { Readable } from "node:stream";

/** The body is larger than the guard's limit. */
export class BodyTooLargeError extends Error {
  constructor(readonly limit: number) {
    super(`the request body has more than ${limit} bytes`);
  }
}

/** The client disconnected before its request was complete. */
export class DisconnectedError extends Error {}

/** Return the body of a request and put it back, so that a body parser may follow. */
export async function peekBody(req: IncomingMessage, limit: number): Promise<Buffer> {
  const { rawBody } = req as { rawBody?: unknown };
  if (Buffer.isBuffer(rawBody)) {
    if (rawBody.length > limit) throw new BodyTooLargeError(limit);
    return rawBody;
  }
  if (req.readableDidRead) {
    throw new Error("the request body was already read: mount idempotency() before the body parser, or set req.rawBody");
  }
  const atEnd = () => req.complete && req.readableLength === 0;
  if (atEnd()) return Buffer.alloc(0);
  return gather(req, limit, "readable", (take) => {
    let chunk: Buffer | null;
    while (!atEnd() && (chunk = req.read() as Buffer | null) !== null) take(chunk);
    if (!atEnd()) return undefined;
    // The read of the last bytes emits 'end' in the next turn, unless bytes are put back in this one.
    return (body) => void (body.length > 0 && req.unshift(body));
  });
}

/** Return all bytes of a stream. */
export function readBody(stream: Readable, limit: number): Promise<Buffer> {
  return gather(stream, limit, "data", (take, chunk) => void (chunk !== undefined && take(chunk)));
}

/** Gather the bytes that `step` takes, until it returns a function for the whole, or the stream ends. */
function gather(
  stream: Readable,
  limit: number,
  event: "readable" | "data",
  step: (take: (chunk: Buffer) => void, chunk?: Buffer) => ((body: Buffer) => void) | undefined,
): Promise<Buffer> {
  return new Promise((resolve, reject) => {
    const chunks: Buffer[] = [];
    let size = 0;
    const take = (chunk: Buffer) => {
      chunks.push(chunk);
      size += chunk.length;
    };
    const settle = (done: () => void) => {
      stream.off(event, onEvent).off("end", onEnd).off("close", onClose).off("error", onClose);
      done();
    };
    const onEvent = (chunk?: Buffer) => {
      const putBack = step(take, chunk);
      if (size > limit) {
        settle(() => reject(new BodyTooLargeError(limit)));
        // The rest must leave the connection before the response is read.
        stream.resume();
      } else if (putBack !== undefined) {
        const body = Buffer.concat(chunks);
        settle(() => resolve(body));
        putBack(body);
      }
    };
    const onEnd = () => settle(() => resolve(Buffer.concat(chunks)));
    const onClose = () => settle(() => reject(new DisconnectedError("the client disconnected")));
    stream.on(event, onEvent).on("end", onEnd).on("close", onClose).on("error", onClose);
  });
}
