import { once } from "node:events";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { Readable } from "node:stream";
import express from "express";
import express4 from "express-4";
import fastify from "fastify";
import { claimOf as claimOfExpress, idempotency as expressIdempotency, type GuardOptions } from "../../src/express.js";
import { claimOf as claimOfFastify, idempotency as fastifyIdempotency } from "../../src/fastify.js";
import type { Client } from "../../src/index.js";

type Claim = ReturnType<typeof claimOfExpress>;

/** The application under test. */
export interface Work {
  /** The parsed body. */
  body: unknown;
  url: string;
  claim: Claim;
  res: ServerResponse;
  /** Send JSON as the framework does. */
  send(status: number, headers: Record<string, string>, body: unknown): void;
  /** Send a stream as the framework does. */
  stream(status: number, headers: Record<string, string>, body: Readable): void;
}

export type Application = (work: Work) => void | Promise<void>;

/** A server whose application is guarded, and which counts how often it ran. */
export interface Guarded extends AsyncDisposable {
  url: string;
  runs: number;
}

type Options = Omit<GuardOptions<IncomingMessage>, "key" | "caller" | "fingerprintBody" | "metadata"> & {
  caller?: (request: { headers: IncomingMessage["headers"] }) => string;
  fingerprintBody?: (request: object, body: Buffer) => string;
};

type Start = (client: Client, application: Application, options?: Options) => Promise<Guarded>;

/** The frameworks that the HTTP tests run on. */
export const FRAMEWORKS: Record<string, Start> = {
  "express 5": (client, application, options) => startExpress(express, client, application, options),
  "express 4": (client, application, options) => startExpress(express4, client, application, options),
  fastify: startFastify,
};

async function startExpress(make: typeof express, client: Client, application: Application, options?: Options): Promise<Guarded> {
  const app = make();
  const guarded = { url: "", runs: 0 };
  const router = make.Router();
  app.use("/api", expressIdempotency(client, options), make.json(), router);
  router.all("/pay*".replace("*", make === express ? "{*rest}" : "*"), (req, res, next) => {
    guarded.runs++;
    const send: Work["send"] = (status, headers, body) => void res.status(status).set(headers).send(body);
    const stream: Work["stream"] = (status, headers, body) => void body.pipe(res.status(status).set(headers));
    // Express 4 does not catch rejections.
    Promise.resolve()
      .then(() => application({ body: req.body, url: req.originalUrl, claim: claimOfExpress(req), res, send, stream }))
      .catch(next);
  });
  // Express logs errors otherwise.
  app.set("env", "test");
  return listening(createServer(app), guarded);
}

async function startFastify(client: Client, application: Application, options?: Options): Promise<Guarded> {
  const app = fastify({ forceCloseConnections: true });
  const guarded = { url: "", runs: 0 };
  await app.register(fastifyIdempotency, { client, ...options });
  app.route({
    method: ["GET", "POST", "PUT", "PATCH"],
    url: "/api/pay*",
    handler: async (request, reply) => {
      guarded.runs++;
      const send: Work["send"] = (status, headers, body) => void reply.code(status).headers(headers).send(body);
      const stream: Work["stream"] = (status, headers, body) => void reply.code(status).headers(headers).send(body);
      const claim = claimOfFastify(request);
      await application({ body: request.body, url: request.originalUrl, claim, res: reply.raw, send, stream });
      return reply;
    },
  });
  await app.ready();
  return listening(app.server, guarded);
}

async function listening(server: Server, guarded: { url: string; runs: number }): Promise<Guarded> {
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  guarded.url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  return Object.assign(guarded, {
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      server.close();
      await once(server, "close");
    },
  });
}
