import { randomUUID } from "node:crypto";
import { Client, type ClientOptions } from "../../src/index.js";
import { LossyProxy } from "./lossy-proxy.js";
import { Service } from "./service.js";
import { STORES, type Store } from "./stores.js";

/** Timeouts long enough for a busy machine; no test waits for them to end. */
export const PATIENT = { timeoutMs: 60_000, attemptTimeoutMs: 60_000 };

/** The service with its own store, a proxy in front of it, and clients of both. */
export class Live implements AsyncDisposable {
  private readonly clients: Client[] = [];

  private constructor(
    private readonly store: Store,
    public service: Service,
    readonly proxy: LossyProxy,
  ) {}

  static async over(store: string): Promise<Live> {
    const started = await STORES[store]!();
    const service = await Service.start(started.url);
    return new Live(started, service, await LossyProxy.before(service.address));
  }

  /** Create a client of the service. */
  client(options: ClientOptions = {}): Client {
    return this.keep(new Client(this.service.address, { ...PATIENT, ...options }));
  }

  /** Create a client of the proxy. */
  clientOfProxy(options: ClientOptions = {}): Client {
    return this.keep(new Client(this.proxy.address, { ...PATIENT, ...options }));
  }

  /** Kill the service and start another on the same store, behind the same proxy. */
  async crash(): Promise<void> {
    await this.service.kill();
    this.service = await Service.start(this.store.url);
    this.proxy.upstream = this.service.address;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const client of this.clients) client.close();
    await this.proxy[Symbol.asyncDispose]();
    await this.service[Symbol.asyncDispose]();
    await this.store[Symbol.asyncDispose]();
  }

  private keep(client: Client): Client {
    this.clients.push(client);
    return client;
  }
}

export function uniqueId(): string {
  return `order-${randomUUID()}`;
}

/** Poll until the condition holds. */
export async function until(condition: () => boolean | Promise<boolean>): Promise<void> {
  const end = Date.now() + 60_000;
  while (!(await condition())) {
    if (Date.now() > end) throw new Error(`not within a minute: ${condition}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
