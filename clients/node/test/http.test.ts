import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { request as httpRequest } from "node:http";
import { connect } from "node:net";
import { Readable } from "node:stream";
import { after, before, suite, test } from "node:test";
import type { Client } from "../src/index.js";
import { FakeClient } from "../src/testing.js";
import { FRAMEWORKS, type Application } from "./harness/frameworks.js";
import { Live, until } from "./harness/live.js";

interface Sent {
  key?: string | undefined;
  path?: string;
  method?: string;
  body?: string;
  headers?: Record<string, string>;
}

const STREAMED = (
  JSON.parse(readFileSync(new URL("../../../golden/http.json", import.meta.url), "utf8")) as {
    streamed: { name: string; content_type: string; parts: number[]; flushed: boolean; streamed: boolean }[];
  }
).streamed;

const pay: Application = ({ body, send }) => send(201, { Location: "/rewards/17", "X-Run": "1" }, { paid: body });

for (const [framework, start] of Object.entries(FRAMEWORKS)) {
  suite(`the guard of ${framework}`, () => {
    let live: Live;
    let client: Client;
    before(async () => {
      live = await Live.over("sqlite");
      client = live.client({ logger: { warn: () => undefined } });
    });
    after(() => live[Symbol.asyncDispose]());

    const post = (url: string, { key, path = "/api/pay", method = "POST", body = '{"amount": 5}', headers = {} }: Sent = {}) =>
      fetch(url + path, {
        method,
        ...(method === "GET" ? {} : { body }),
        headers: { "content-type": "application/json", ...(key && { "idempotency-key": key }), ...headers },
        redirect: "manual",
      });

    test("a request is run once, and its response is replayed with the stored headers", async () => {
      await using app = await start(client, pay);
      const key = randomUUID();
      const first = await post(app.url, { key });
      const again = await post(app.url, { key: `"${key}"` });
      assert.deepEqual([first.status, again.status], [201, 201]);
      const body = await first.text();
      assert.equal(body, '{"paid":{"amount":5}}');
      assert.equal(await again.text(), body);
      assert.deepEqual([first.headers.get("idempotency-replayed"), again.headers.get("idempotency-replayed")], [null, "true"]);
      for (const name of ["content-type", "location"]) assert.equal(again.headers.get(name), first.headers.get(name));
      assert.equal(again.headers.get("x-run"), null);
      assert.equal(app.runs, 1);
      const found = await client.get(`http::POST:/api/pay:${key}`);
      assert.equal(found!.state, "completed");
      assert.match(found!.result.toString(), /^dedup-http\/2 201 replay\n/);
    });

    test("ten concurrent requests run once; the others are refused or receive the response", async () => {
      await using app = await start(client, pay, { waitMs: 60_000 });
      const key = randomUUID();
      const all = await Promise.all(Array.from({ length: 10 }, () => post(app.url, { key })));
      assert.deepEqual(all.map(({ status }) => status), Array(10).fill(201));
      assert.equal(app.runs, 1);
    });

    test("a request in progress is refused with 409, without id and claimant", async () => {
      let leave = () => {};
      const left = new Promise<void>((resolve) => (leave = resolve));
      await using app = await start(client, async (work) => {
        await left;
        await pay(work);
      });
      const key = randomUUID();
      const first = post(app.url, { key });
      await until(() => app.runs === 1);
      const second = await post(app.url, { key });
      assert.deepEqual([second.status, second.headers.get("retry-after")], [409, "1"]);
      const text = await second.text();
      assert.ok(!text.includes(key), text);
      leave();
      assert.equal((await first).status, 201);
    });

    test("another body or query is refused with 422", async () => {
      await using app = await start(client, pay);
      const key = randomUUID();
      await post(app.url, { key });
      assert.equal((await post(app.url, { key, body: '{"amount": 6}' })).status, 422);
      assert.equal((await post(app.url, { key, path: "/api/pay?a=1" })).status, 422);
      assert.equal(app.runs, 1);
    });

    test("a hook replaces the body in the fingerprint", async () => {
      const fingerprintBody = (_: object, body: Buffer) => JSON.stringify(JSON.parse(body.toString()));
      await using app = await start(client, pay, { fingerprintBody });
      const key = randomUUID();
      await post(app.url, { key });
      assert.equal((await post(app.url, { key, body: '{ "amount":5 }' })).status, 201);
      assert.equal(app.runs, 1);
    });

    test("methods, paths and callers separate keys, also below a mounted prefix", async () => {
      await using app = await start(client, pay, { caller: ({ headers }) => String(headers["x-user"] ?? "") });
      const key = randomUUID();
      await post(app.url, { key });
      await post(app.url, { key, method: "PATCH" });
      await post(app.url, { key, path: "/api/pay/caf%C3%A9" });
      await post(app.url, { key, headers: { "x-user": "a:b" } });
      assert.equal(app.runs, 4);
      assert.ok(await client.get(`http::PATCH:/api/pay:${key}`));
      assert.ok(await client.get(`http::POST:/api/pay/café:${key}`));
      assert.ok(await client.get(`http:a%3Ab:POST:/api/pay:${key}`));
    });

    test("requests without a key and other methods are not guarded", async () => {
      await using app = await start(client, pay);
      const key = randomUUID();
      for (const sent of [{}, {}, { key, method: "PUT" }, { key, method: "PUT" }, { key, method: "GET" }]) {
        assert.equal((await post(app.url, sent)).status, 201);
      }
      assert.equal(app.runs, 5);
    });

    test("invalid keys are refused with 400", async () => {
      await using app = await start(client, pay, { required: true });
      assert.equal((await post(app.url)).status, 400);
      for (const key of ['""', "a b", '"a"x', "x".repeat(600)]) assert.equal((await post(app.url, { key })).status, 400, key);
      const two = await raw(app.url, "POST /api/pay HTTP/1.1", ["Idempotency-Key: a", "Idempotency-Key: a"], "{}");
      assert.match(two, /^HTTP\/1.1 400 /);
      assert.match(two, /client-contract.md#key-invalid/);
      for (const path of ["/api/pay/%E9", "/api/pay/%zz", "/api/pay/100%"]) {
        assert.match(await raw(app.url, `POST ${path} HTTP/1.1`, ["Idempotency-Key: a"], "{}"), /^HTTP\/1.1 400 /);
      }
      assert.equal(app.runs, 0);
    });

    for (const [does, statuses] of [
      ["completes", [200, 204, 303]],
      ["releases", [400, 401, 404, 422, 429]],
      ["keeps", [500, 503]],
    ] as const) {
      test(`a status that ${does} the claim: ${statuses}`, async () => {
        await using app = await start(client, ({ body, send }) => send((body as { status: number }).status, {}, ""));
        for (const status of statuses) {
          const key = randomUUID();
          const sent = { key, body: JSON.stringify({ status }) };
          const before = app.runs;
          assert.equal((await post(app.url, sent)).status, status);
          const again = await post(app.url, sent);
          assert.equal(again.status, does === "keeps" ? 409 : status);
          assert.equal(app.runs - before, does === "releases" ? 2 : 1);
        }
      });
    }

    test("a predicate changes what a status means", async () => {
      const onStatus = (status: number) => (status === 402 ? "keep" : "complete");
      await using app = await start(client, ({ send }) => send(402, {}, ""), { onStatus });
      const key = randomUUID();
      assert.equal((await post(app.url, { key })).status, 402);
      assert.equal((await post(app.url, { key })).status, 409);
    });

    test("an exception keeps the claim", async () => {
      await using app = await start(client, () => Promise.reject(new Error("no answer from the bank")));
      const key = randomUUID();
      assert.equal((await post(app.url, { key })).status, 500);
      assert.equal((await post(app.url, { key })).status, 409);
      assert.equal(app.runs, 1);
    });

    test("a body that the parser rejects may be corrected under the same key", async () => {
      await using app = await start(client, pay);
      const key = randomUUID();
      assert.equal((await post(app.url, { key, body: '{"amount": 5' })).status, 400);
      assert.equal((await post(app.url, { key })).status, 201);
    });

    test("the work may end its claim itself", async () => {
      await using app = await start(client, async ({ claim, send }) => {
        await claim!.release();
        send(200, {}, { paid: 0 });
      });
      const key = randomUUID();
      for (let time = 0; time < 2; time++) assert.equal((await post(app.url, { key })).status, 200);
      assert.equal(app.runs, 2);
    });

    test("a large response is sent, but a duplicate is told to look elsewhere", async () => {
      await using app = await start(client, ({ body, send }) => {
        const { location } = body as { location?: string };
        send(201, location ? { Location: location } : {}, { paid: "x".repeat(10_000) });
      });
      for (const [body, status, location] of [
        ["{}", 410, null],
        ['{"location": "/rewards/17"}', 303, "/rewards/17"],
      ] as const) {
        const key = randomUUID();
        const first = await post(app.url, { key, body });
        assert.deepEqual([first.status, (await first.text()).length], [201, 10_011]);
        const again = await post(app.url, { key, body });
        assert.deepEqual([again.status, again.headers.get("location")], [status, location]);
        assert.equal(again.headers.get("idempotency-replayed"), "true");
      }
      assert.equal(app.runs, 2);
    });

    test("a response larger than the service keeps is completed without its body", async () => {
      const warned: string[] = [];
      const own = live.client({ logger: { warn: (message: string) => void warned.push(message) } });
      await using app = await start(own, ({ send }) => send(201, {}, { paid: "x".repeat(10_000) }), { maxStoredBytes: 100_000 });
      const key = randomUUID();
      assert.equal((await post(app.url, { key })).status, 201);
      assert.equal((await post(app.url, { key })).status, 410);
      assert.match((await client.get(`http::POST:/api/pay:${key}`))!.result.toString(), /^dedup-http\/2 201 no-body\n/);
      // Nothing went wrong.
      assert.deepEqual(warned, []);
    });

    test("small streams are replayed, large streams pass through and are stored without their body", async () => {
      const stream: Application = ({ body, stream }) => {
        const { parts } = body as { parts: number };
        stream(200, { "Content-Type": "text/plain" }, Readable.from(Array<string>(parts).fill("x".repeat(1000))));
      };
      await using app = await start(client, stream);
      for (const [parts, status] of [[3, 200], [50, 410]] as const) {
        const sent = { key: randomUUID(), body: JSON.stringify({ parts }) };
        assert.equal((await (await post(app.url, sent)).text()).length, 1000 * parts);
        assert.equal((await post(app.url, sent)).status, status);
      }
    });

    for (const { name, content_type, parts, flushed, streamed } of STREAMED) {
      test(`what counts as streamed: ${name}`, async () => {
        await using app = await start(new FakeClient(), ({ res }) => {
          res.writeHead(200, { "Content-Type": content_type });
          if (flushed) res.flushHeaders();
          for (const size of parts) res.write("x".repeat(size));
          res.end();
        });
        const [first, again] = [await post(app.url, { key: "k-1" }), await post(app.url, { key: "k-1" })];
        const size = parts.reduce((sum, part) => sum + part, 0);
        assert.deepEqual([first.status, (await first.text()).length, again.status], [200, size, streamed ? 410 : 200]);
        assert.equal(app.runs, 1);
      });
    }

    test("an event stream passes through as it is written", async () => {
      let write = (_: string) => {};
      let end = () => {};
      await using app = await start(client, ({ stream }) => {
        const events = new Readable({ read() {} });
        write = (text) => void events.push(text);
        end = () => void events.push(null);
        stream(200, { "Content-Type": "text/event-stream" }, events);
      });
      const key = randomUUID();
      const pending = post(app.url, { key });
      await until(() => app.runs === 1);
      write("data: 1\n\n");
      const reader = (await pending).body!.getReader();
      assert.equal(Buffer.from((await reader.read()).value!).toString(), "data: 1\n\n");
      assert.equal((await client.get(`http::POST:/api/pay:${key}`))!.state, "in progress");
      end();
      assert.equal((await reader.read()).done, true);
      assert.equal((await post(app.url, { key })).status, 410);
    });

    test("the claim is completed before the last byte is sent, also of a stream with a declared length", async () => {
      await using app = await start(client, ({ res, body }) => {
        const { size } = body as { size: number };
        res.writeHead(200, { "Content-Type": "text/plain", "Content-Length": size });
        for (let sent = 0; sent < size; sent += 1000) res.write("x".repeat(1000));
        res.end();
      });
      for (const size of [2000, 20_000]) {
        const key = randomUUID();
        const states: string[] = [];
        const response = await post(app.url, { key, body: JSON.stringify({ size }) });
        let left = size;
        for await (const chunk of response.body!) {
          left -= chunk.length;
          if (left === 0) states.push((await client.get(`http::POST:/api/pay:${key}`))!.state);
        }
        assert.deepEqual([left, states], [0, ["completed"]]);
      }
    });

    test("a client that disconnects receives the response when it sends the request again", async () => {
      let leave = () => {};
      const left = new Promise<void>((resolve) => (leave = resolve));
      await using app = await start(client, async (work) => {
        const closed = new Promise((resolve) => work.res.once("close", resolve));
        leave();
        await closed;
        await pay(work);
      });
      const key = randomUUID();
      const controller = new AbortController();
      const first = fetch(`${app.url}/api/pay`, {
        method: "POST",
        body: '{"amount": 5}',
        headers: { "content-type": "application/json", "idempotency-key": key },
        signal: controller.signal,
      });
      await left;
      controller.abort();
      await assert.rejects(first);
      await until(async () => (await client.get(`http::POST:/api/pay:${key}`))?.state === "completed");
      const again = await post(app.url, { key });
      assert.deepEqual([again.status, await again.json(), app.runs], [201, { paid: { amount: 5 } }, 1]);
    });

    test("a response that is cut keeps the claim until it expires", async () => {
      const fake = new FakeClient();
      await using app = await start(fake, ({ stream, res }) => {
        const endless = new Readable({ read() {} });
        endless.push("x".repeat(10_000));
        stream(200, { "Content-Type": "text/plain" }, endless);
        res.once("close", () => void (closed = true));
      });
      let closed = false;
      const key = randomUUID();
      const reader = (await post(app.url, { key })).body!.getReader();
      await reader.read();
      await fake.service.advance(600_000);
      assert.equal((await post(app.url, { key })).status, 409);
      await reader.cancel();
      await until(() => closed);
      assert.equal((await post(app.url, { key })).status, 409);
      await fake.service.advance(60_000);
      assert.equal(await fake.get(`http::POST:/api/pay:${key}`), undefined);
    });

    test("bodies reach the application unchanged, in every transfer", async () => {
      await using app = await start(client, ({ body, send }) => send(200, {}, { got: body ?? null }), { maxBodyBytes: 300_000 });
      const text = JSON.stringify({ text: "x".repeat(90_000) });
      for (const [body, chunked] of [["{}", false], ["{}", true], [text, false], [text, true]] as const) {
        const got = await upload(app.url, body, chunked, randomUUID());
        assert.equal(got.status, 200);
        assert.deepEqual(JSON.parse(got.text), { got: JSON.parse(body) });
      }
      for (const chunked of [false, true]) {
        const [plain, guarded] = [await upload(app.url, "", chunked), await upload(app.url, "", chunked, randomUUID())];
        assert.deepEqual(guarded, plain);
      }
    });

    test("a body over the limit is refused with 413, and the connection stays usable", async () => {
      await using app = await start(client, pay, { maxBodyBytes: 1000 });
      const body = JSON.stringify({ text: "x".repeat(500_000) });
      for (const chunked of [false, true]) {
        const got = await upload(app.url, body, chunked, randomUUID());
        assert.deepEqual([got.status, JSON.parse(got.text).detail], [413, "A request with an Idempotency-Key may have a body of up to 1000 bytes."]);
      }
      assert.equal(app.runs, 0);
    });

    test("work longer than its ttl runs once", async () => {
      await using app = await start(
        client,
        async ({ claim, send }) => {
          const end = claim!.transaction!.expireTime!.getTime();
          await until(() => claim!.lost || claim!.transaction!.expireTime!.getTime() > end + 4000);
          send(claim!.lost ? 500 : 201, {}, {});
        },
        { ttlMs: 3000 },
      );
      const key = randomUUID();
      const [first, second] = [post(app.url, { key }), until(() => app.runs === 1).then(() => post(app.url, { key }))];
      assert.deepEqual([(await first).status, (await second).status, app.runs], [201, 409, 1]);
      assert.equal((await post(app.url, { key })).status, 201);
    });

    test("an unavailable service is answered with 503, and the request is not run", async () => {
      const away = new FakeClient();
      away.service.unavailable = true;
      await using app = await start(away, pay);
      const refused = await post(app.url, { key: "k-1" });
      assert.deepEqual([refused.status, refused.headers.get("retry-after"), app.runs], [503, "1", 0]);
    });

    test("a completion that fails does not change the response", async () => {
      const fake = new FakeClient(undefined, { logger: { warn: () => undefined } });
      await using app = await start(fake, (work) => {
        fake.service.unavailable = true;
        return pay(work);
      });
      assert.equal((await post(app.url, { key: "k-1" })).status, 201);
      fake.service.unavailable = false;
      assert.equal((await post(app.url, { key: "k-1" })).status, 409);
    });

    test("headers to store and the header of replays are options; cookies are never stored", async () => {
      const options = { storedHeaders: ["X-Reward", "Set-Cookie"], replayedHeader: "X-Again" };
      await using app = await start(client, ({ send }) => send(200, { "X-Reward": "5", "Set-Cookie": "session=1" }, {}), options);
      const key = randomUUID();
      await post(app.url, { key });
      const { headers } = await post(app.url, { key });
      assert.deepEqual(
        ["x-reward", "set-cookie", "x-again", "idempotency-replayed"].map((name) => headers.get(name)),
        ["5", null, "true", null],
      );
    });

    test("responses of the older formats are replayed", async () => {
      await using app = await start(client, pay, { fingerprintBody: () => "" });
      for (const result of [
        Buffer.from('dedup-http/1 replay 201 application/json\n{"paid": 5}'),
        Buffer.concat([Buffer.from([2, 0, 201, 0, 16]), Buffer.from('application/json{"paid": 5}')]),
      ]) {
        const key = randomUUID();
        const claim = await client.claim(`http::POST:/api/pay:${key}`);
        await claim.complete(result);
        const again = await post(app.url, { key });
        assert.deepEqual([again.status, again.headers.get("content-type"), await again.json()], [201, "application/json", { paid: 5 }]);
      }
      assert.equal(app.runs, 0);
    });
  });
}

/** Send one request and return the whole response as text. */
async function raw(url: string, line: string, headers: string[], body: string): Promise<string> {
  const { hostname, port } = new URL(url);
  const socket = connect(Number(port), hostname);
  const type = body ? ["Content-Type: application/json"] : [];
  const head = [line, `Host: ${hostname}`, "Connection: close", `Content-Length: ${body.length}`, ...type, ...headers];
  socket.write(`${head.join("\r\n")}\r\n\r\n${body}`);
  let text = "";
  for await (const chunk of socket) text += String(chunk);
  return text;
}

/** Send a JSON body in parts, with its length declared or not. */
function upload(url: string, body: string, chunked: boolean, key?: string): Promise<{ status: number; text: string }> {
  return new Promise((resolve, reject) => {
    const headers = {
      "content-type": "application/json",
      ...(key && { "idempotency-key": key }),
      ...(chunked ? { "transfer-encoding": "chunked" } : { "content-length": body.length }),
    };
    const req = httpRequest(`${url}/api/pay`, { method: "POST", headers }, async (res) => {
      let text = "";
      for await (const chunk of res) text += String(chunk);
      resolve({ status: res.statusCode!, text });
    });
    req.on("error", reject);
    const write = (at: number) => {
      if (at >= body.length) return req.end();
      req.write(body.slice(at, at + 30_000));
      setImmediate(write, at + 30_000);
      return undefined;
    };
    write(0);
  });
}
