import { Readable } from "node:stream";
import type { FastifyPluginCallback, FastifyRequest } from "fastify";
import type { Client } from "./client.js";
import { respond } from "./http/answers.js";
import { readBody } from "./http/body.js";
import { Guard, type GuardOptions } from "./http/guard.js";

export { claimOf, type GuardOptions, type StatusOutcome } from "./http/guard.js";

export interface IdempotencyOptions extends GuardOptions<FastifyRequest> {
  client: Client;
}

/** Plugin that runs each request with an Idempotency-Key once, and replays its response (Fastify 5). */
export const idempotency: FastifyPluginCallback<IdempotencyOptions> = (app, { client, ...options }, done) => {
  const guard = new Guard<FastifyRequest>(client, options);
  // After the onRequest hooks, which authenticate callers, and before the body is parsed.
  app.addHook("preParsing", async (request, reply, payload) => {
    let rest = payload;
    const body = async (limit: number) => {
      const bytes = await readBody(payload as Readable, limit);
      rest = Object.assign(Readable.from(bytes.length > 0 ? [bytes] : []), { receivedEncodedLength: bytes.length });
      return bytes;
    };
    const exchange = { request, req: request.raw, res: reply.raw, target: request.originalUrl, body };
    let admitted = false;
    const accept = () => void (admitted = true);
    await guard.admit(exchange, accept, (answer) => {
      // Those of earlier hooks, such as for CORS.
      for (const [name, value] of Object.entries(reply.getHeaders())) reply.raw.setHeader(name, value!);
      respond(reply.raw, answer);
    });
    if (!admitted) reply.hijack();
    return rest;
  });
  done();
};

// The hooks apply to the application that registers the plugin, not only to the plugin.
Object.assign(idempotency, {
  [Symbol.for("skip-override")]: true,
  [Symbol.for("plugin-meta")]: { name: "dedup-client", fastify: "5.x" },
});
