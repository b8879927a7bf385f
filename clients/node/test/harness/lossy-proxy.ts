import { connect, createServer, type AddressInfo, type Server, type Socket } from "node:net";
import { once } from "node:events";

const FRAME_HEADER_BYTES = 9;
const HEADERS_FRAME = 1;
const PREFACE_BYTES = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".length;

/** How a reply is lost: its connection breaks, or it arrives after the caller has retried. */
export type Loss = "break" | "late";

/**
 * A TCP proxy that loses replies of the service on request.
 *
 * The service acts on the call. The proxy drops its answer, recognised by the HTTP/2 HEADERS frame that starts it.
 */
export class LossyProxy implements AsyncDisposable {
  /** How to lose the next replies, one entry each. */
  losses: Loss[] = [];
  /** Called on each loss, after the service acted and before the caller receives anything. */
  onLoss: (() => void) | undefined;
  private readonly sockets = new Set<Socket>();

  private constructor(
    private readonly server: Server,
    /** The address of the service; may change for new connections. */
    public upstream: string,
  ) {
    server.on("connection", (client) => this.serve(client));
  }

  /** Listen on a free port. */
  static async before(upstream: string): Promise<LossyProxy> {
    const server = createServer();
    server.listen(0, "127.0.0.1");
    await once(server, "listening");
    return new LossyProxy(server, upstream);
  }

  /** The target for a client. */
  get address(): string {
    return `127.0.0.1:${(this.server.address() as AddressInfo).port}`;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.server.close();
    for (const socket of this.sockets) socket.destroy();
    await once(this.server, "close");
  }

  private serve(client: Socket): void {
    const [host, port] = this.upstream.split(":") as [string, string];
    const service = connect(Number(port), host);
    for (const [socket, other] of [
      [client, service],
      [service, client],
    ] as const) {
      this.sockets.add(socket);
      socket.on("error", () => other.destroy());
      socket.on("close", () => {
        this.sockets.delete(socket);
        other.destroy();
      });
    }
    const requests = new FrameReader(PREFACE_BYTES);
    const replies = new FrameReader(0);
    let held: Buffer[] | undefined;
    client.on("data", (bytes) => {
      service.write(bytes);
      if (!requests.read(bytes).includes(HEADERS_FRAME) || held === undefined) return;
      client.write(Buffer.concat(held));
      held = undefined;
    });
    service.on("data", (bytes) => {
      const reply = replies.read(bytes).includes(HEADERS_FRAME);
      const loss = reply && held === undefined ? this.losses.shift() : undefined;
      if (loss !== undefined) this.onLoss?.();
      if (loss === "late") held = [];
      if (loss === "break") client.destroy();
      else if (held !== undefined) held.push(bytes);
      else client.write(bytes);
    });
  }
}

/** Finds the frames in a chunked HTTP/2 stream. */
class FrameReader {
  private pending = Buffer.alloc(0);

  constructor(private skip: number) {}

  /** Return the types of the frames that are now complete. */
  read(bytes: Buffer): number[] {
    this.pending = Buffer.concat([this.pending, bytes.subarray(this.skip)]);
    this.skip = Math.max(0, this.skip - bytes.length);
    const types: number[] = [];
    while (this.pending.length >= FRAME_HEADER_BYTES) {
      const end = FRAME_HEADER_BYTES + this.pending.readUIntBE(0, 3);
      if (this.pending.length < end) break;
      types.push(this.pending.readUInt8(3));
      this.pending = this.pending.subarray(end);
    }
    return types;
  }
}
