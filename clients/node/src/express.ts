import type { IncomingMessage, ServerResponse } from "node:http";
import type { Client } from "./client.js";
import { respond } from "./http/answers.js";
import { peekBody } from "./http/body.js";
import { Guard, type GuardOptions } from "./http/guard.js";

export { claimOf, type GuardOptions, type StatusOutcome } from "./http/guard.js";

/**
 * Middleware that runs each request with an Idempotency-Key once, and replays its response (Express 4 and 5).
 *
 * Mount it before body parsers: it reads the raw body and puts it back. A parser before it must set `req.rawBody`.
 */
export function idempotency<Request extends IncomingMessage = IncomingMessage>(
  client: Client,
  options: GuardOptions<Request> = {},
): (req: Request, res: ServerResponse, next: (error?: unknown) => void) => void {
  const guard = new Guard<Request>(client, options);
  return (req, res, next) => {
    // Routers shorten `url`.
    const target = (req as { originalUrl?: string }).originalUrl ?? req.url ?? "";
    const exchange = { request: req, req, res, target, body: (limit: number) => peekBody(req, limit) };
    guard.admit(exchange, () => next(), (answer) => respond(res, answer)).catch(next);
  };
}
