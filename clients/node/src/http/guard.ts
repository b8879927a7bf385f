import type { IncomingMessage, ServerResponse } from "node:http";
import type { Claim } from "../claim.js";
import type { Client } from "../client.js";
import { ResultNotStoredError } from "../errors.js";
import type { CallMetadata } from "../options.js";
import { answerTo, type Answer } from "./answers.js";
import { DisconnectedError } from "./body.js";
import { holdBack } from "./held-response.js";
import { fingerprintOf, KeyError, parseKey, parseTarget, requestId, type Target } from "./identity.js";
import { encodeNoBody, encodeStored, storedNames, type Recorded } from "./stored.js";

/** The end of a claim. */
export type StatusOutcome = "complete" | "release" | "keep";

/** Options of the HTTP guards. `Request` is that of the framework. */
export interface GuardOptions<Request> {
  /** The guarded methods; default POST and PATCH. */
  methods?: readonly string[] | undefined;
  /** Refuse guarded methods without a key; default false. */
  required?: boolean | undefined;
  /** The key of a request, in place of the header Idempotency-Key; undefined if it has none. */
  key?: ((request: Request) => string | undefined) | undefined;
  /** Returns the caller, such as a user id. Set it where callers must not receive each other's responses. */
  caller?: ((request: Request) => string | PromiseLike<string>) | undefined;
  /** Replaces the body in the fingerprint, for example by canonical JSON. */
  fingerprintBody?: ((request: Request, body: Buffer) => string | Uint8Array) | undefined;
  /** The namespace of the claims; default the client's. */
  namespace?: string | undefined;
  /** The lifetime of a claim, from its last extension; default that of the namespace, 60 s. */
  ttlMs?: number | undefined;
  /** How long a duplicate waits for work in progress to end; default 0. */
  waitMs?: number | undefined;
  /** How long a response is replayed; default that of the namespace. */
  retentionMs?: number | undefined;
  /** Extend claims while their work runs; default true. */
  keepAlive?: boolean | undefined;
  /** No extension ends later than this long after the claim; default one hour. */
  maxHoldMs?: number | undefined;
  /** The largest body of a guarded request; default 1 MiB. */
  maxBodyBytes?: number | undefined;
  /** The largest stored response, with its headers; default 4,096. A larger one is stored without its body. */
  maxStoredBytes?: number | undefined;
  /** Headers to store in addition to those of the contract; never Set-Cookie. */
  storedHeaders?: readonly string[] | undefined;
  /** The header of replays; default Idempotency-Replayed, false for none. */
  replayedHeader?: string | false | undefined;
  /** The outcome of a status; default: 2xx and 3xx complete, 4xx release, 5xx keep. */
  onStatus?: ((status: number) => StatusOutcome) | undefined;
  /** Metadata of the service calls for a request, such as `x-correlation-id`. */
  metadata?: ((request: Request) => CallMetadata | undefined) | undefined;
}

/** One request of a framework. */
export interface Exchange<Request> {
  request: Request;
  req: IncomingMessage;
  res: ServerResponse;
  /** As the client sent it. */
  target: string;
  /** Returns the body, and leaves it to the application. */
  body(limit: number): Promise<Buffer>;
}

const claims = new WeakMap<object, Claim>();

/** Return the claim of a guarded request: its `signal` aborts when the claim is lost. */
export function claimOf(request: object): Claim | undefined {
  return claims.get(request);
}

/** The default outcome of a status. */
export function outcomeOf(status: number): StatusOutcome {
  if (status >= 500) return "keep";
  return status >= 400 ? "release" : "complete";
}

/** Runs each request with an Idempotency-Key once, for every framework over node:http. */
export class Guard<Request extends object> {
  readonly #client: Client;
  readonly #options: GuardOptions<Request>;
  readonly #methods: ReadonlySet<string>;
  readonly #storedNames: ReadonlySet<string>;
  readonly #maxStoredBytes: number;

  constructor(client: Client, options: GuardOptions<Request>) {
    this.#client = client;
    this.#options = options;
    this.#methods = new Set(options.methods ?? ["POST", "PATCH"]);
    this.#storedNames = storedNames(options.storedHeaders);
    this.#maxStoredBytes = options.maxStoredBytes ?? 4096;
  }

  /** Call `accept` if the application may handle the request, and otherwise `refuse`, unless the client is gone. */
  async admit(exchange: Exchange<Request>, accept: () => void, refuse: (answer: Answer) => void): Promise<void> {
    const { request, res } = exchange;
    try {
      const claim = await this.#claim(exchange);
      if (claim !== undefined) {
        claims.set(request, claim);
        holdBack(res, this.#maxStoredBytes, {
          ended: (response) => this.#end(claim, response),
          cut: () => claim.keep(),
        });
      }
    } catch (error) {
      if (error instanceof DisconnectedError) return;
      const answer = answerTo(error, this.#options.replayedHeader ?? "Idempotency-Replayed");
      if (answer === undefined) throw error;
      return refuse(answer);
    }
    accept();
  }

  async #claim({ request, req, res, target, body }: Exchange<Request>): Promise<Claim | undefined> {
    const method = req.method ?? "";
    const key = this.#methods.has(method) ? this.#keyOf(request, req) : undefined;
    if (key === undefined) return undefined;
    const { caller, namespace, ttlMs, waitMs, keepAlive = true, maxHoldMs, metadata, maxBodyBytes } = this.#options;
    const parsed = parseTarget(target);
    const id = requestId((await caller?.(request)) ?? "", method, parsed.path, key);
    const fingerprint = this.#fingerprint(request, method, parsed, await body(maxBodyBytes ?? 1024 * 1024));
    const gone = new AbortController();
    const onClose = () => gone.abort(new DisconnectedError("the client disconnected"));
    res.once("close", onClose);
    try {
      const { signal } = gone;
      const options = { namespace, ttlMs, waitMs, fingerprint, keepAlive, maxHoldMs, signal };
      return await this.#client.claim(id, { ...options, metadata: metadata?.(request) });
    } finally {
      res.off("close", onClose);
    }
  }

  /** Throws KeyError. */
  #keyOf(request: Request, req: IncomingMessage): string | undefined {
    const { key: keyOf, required } = this.#options;
    const key = keyOf === undefined ? headerKey(req) : keyOf(request);
    if (key === "" || (key === undefined && required)) throw new KeyError();
    return key;
  }

  #fingerprint(request: Request, method: string, target: Target, body: Buffer): Buffer {
    return fingerprintOf(method, target, this.#options.fingerprintBody?.(request, body) ?? body);
  }

  /** End the claim; failures are logged, since the response is sent anyway. */
  async #end(claim: Claim, response: Recorded): Promise<void> {
    if (claim.ended) return;
    try {
      const outcome = (this.#options.onStatus ?? outcomeOf)(response.status);
      if (outcome === "complete") await this.#complete(claim, response);
      else if (outcome === "release") await claim.release();
      else claim.keep();
    } catch (error) {
      claim.keep();
      this.#client.warn("dedup claim not ended", claim, error);
    }
  }

  async #complete(claim: Claim, response: Recorded): Promise<void> {
    const stored = encodeStored(response, this.#storedNames, this.#maxStoredBytes);
    const noBody = encodeNoBody(response, this.#maxStoredBytes);
    try {
      await claim.completeOr(stored, noBody, { ttlMs: this.#options.retentionMs });
    } catch (error) {
      // The service keeps less than this guard: completed without the body, as for any large response.
      if (!(error instanceof ResultNotStoredError)) throw error;
    }
  }
}

/** Throws KeyError. */
function headerKey({ rawHeaders }: IncomingMessage): string | undefined {
  const values = rawHeaders.filter((_, at) => at % 2 === 1 && rawHeaders[at - 1]!.toLowerCase() === "idempotency-key");
  return values.length === 0 ? undefined : parseKey(values);
}
