import assert from "node:assert/strict";
import { createServer, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { test } from "node:test";
import { holdBack } from "../src/http/held-response.js";
import type { Recorded } from "../src/http/stored.js";

/** Answer one request with `application`, held back; returns the response and what the watcher learned. */
async function answered(application: (res: ServerResponse) => void, limit = 100) {
  const recorded: Recorded[] = [];
  const watcher = { ended: async (response: Recorded) => void recorded.push(response), cut: () => undefined };
  const server = createServer((_, res) => {
    holdBack(res, limit, watcher);
    application(res);
  });
  await new Promise<void>((resolve) => void server.listen(0, "127.0.0.1", resolve));
  const response = await fetch(`http://127.0.0.1:${(server.address() as AddressInfo).port}`);
  const text = await response.text();
  server.closeAllConnections();
  server.close();
  return { response, text, recorded: recorded[0]! };
}

test("a response that is held back looks sent to its application", async () => {
  const seen: unknown[] = [];
  const { response } = await answered((res) => {
    seen.push([res.headersSent, res.writableEnded]);
    res.writeHead(201);
    assert.throws(() => res.writeHead(202), { code: "ERR_HTTP_HEADERS_SENT" });
    seen.push([res.headersSent, res.writableEnded]);
    res.end("paid");
    seen.push([res.headersSent, res.writableEnded]);
    // Too late: the response has ended.
    res.statusCode = 500;
    res.write("more");
    res.end("again");
    res.once("finish", () => seen.push([res.headersSent, res.writableEnded]));
  });
  assert.equal(response.status, 201);
  assert.deepEqual(seen, [[false, false], [true, false], [true, true], [true, true]]);
});

for (const [form, headers] of [
  ["an object", { Link: ["<a>", "<b>"], ETag: '"7"' }],
  ["pairs", [["Link", "<a>"], ["Link", "<b>"], ["ETag", '"7"']]],
  ["a flat list", ["Link", "<a>", "Link", "<b>", "ETag", '"7"']],
] as const) {
  test(`the headers of writeHead are recorded and sent, given as ${form}`, async () => {
    const { response, text, recorded } = await answered((res) => {
      res.setHeader("ETag", '"6"');
      res.writeHead(200, "Fine", headers as unknown as string[]);
      res.write("pa");
      res.end(Buffer.from("id"));
    });
    assert.deepEqual([response.statusText, response.headers.get("link"), response.headers.get("etag")], ["Fine", "<a>, <b>", '"7"']);
    assert.equal(response.headers.get("content-length"), "4");
    assert.deepEqual([text, recorded.body.toString(), recorded.streamed], ["paid", "paid", false]);
    const links = recorded.headers.filter(([name]) => name.toLowerCase() === "link").map(([, value]) => value);
    assert.deepEqual(links, ["<a>", "<b>"]);
  });
}

test("headers that other middleware sets when the head is written are recorded", async () => {
  const { recorded } = await answered((res) => {
    const { writeHead } = res;
    res.writeHead = function (...args: [number]) {
      res.setHeader("ETag", '"7"');
      return writeHead.apply(res, args);
    };
    res.end("paid");
  });
  assert.deepEqual(recorded.headers, [["etag", '"7"']]);
});

for (const [how, application] of [
  ["flushes its headers", (res: ServerResponse) => (res.flushHeaders(), res.end("paid"))],
  ["is an event stream", (res: ServerResponse) => res.writeHead(200, { "Content-Type": "text/event-stream" }).end("paid")],
  ["outgrows the limit", (res: ServerResponse) => (res.write("x".repeat(101)), res.end("paid"))],
] as const) {
  test(`a response is streamed if it ${how}`, async () => {
    const { text, recorded } = await answered(application);
    assert.ok(text.endsWith("paid"));
    assert.equal(recorded.streamed, true);
  });
}

test("callbacks of writes and of the end are called", async () => {
  let called = 0;
  await answered((res) => res.write("a", () => res.write("b", "utf8", () => res.end("c", () => called++))));
  assert.equal(called, 1);
});
