import { randomUUID } from "node:crypto";
import { Client, type ClientOptions } from "../../src/index.js";
import { LossyProxy } from "./lossy-proxy.js";
import { Service } from "./service.js";
import { STORES, type Store } from "./stores.js";

/** Enough for a machine that is busy with something else; no test waits for its end. */
export const PATIENT = { timeoutMs: 60_000, attemptTimeoutMs: 60_000 };

/** The service over a store of its own, a proxy before it, and clients of both. */
export class Live implements AsyncDisposable {
  private readonly clients: Client[] = [];

  private constructor(
    private readonly store: Store,
    public service: Service,
    readonly proxy: LossyProxy,
  ) {}

  /** Starts all of it. */
  static async over(store: string): Promise<Live> {
    const started = await STORES[store]!();
    const service = await Service.start(started.url);
    return new Live(started, service, await LossyProxy.before(service.address));
  }

  /** Makes a client that asks the service itself. */
  client(options: ClientOptions = {}): Client {
    return this.keep(new Client(this.service.address, { ...PATIENT, ...options }));
  }

  /** Makes a client that asks through the proxy. */
  clientOfProxy(options: ClientOptions = {}): Client {
    return this.keep(new Client(this.proxy.address, { ...PATIENT, ...options }));
  }

  /** Kills the service and starts another on the same store, behind the same proxy. */
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

/** Makes an id that no other test has. */
export function uniqueId(): string {
  return `order-${randomUUID()}`;
}
