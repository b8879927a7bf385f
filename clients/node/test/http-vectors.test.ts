import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { DuplicateTransactionError, InvalidRequestError, PayloadMismatchError, UnavailableError } from "../src/index.js";
import { answerTo } from "../src/http/answers.js";
import { BodyTooLargeError } from "../src/http/body.js";
import { outcomeOf } from "../src/http/guard.js";
import { fingerprintOf, KeyError, parseKey, parseTarget, requestId } from "../src/http/identity.js";
import { decodeStored, encodeStored, storedNames } from "../src/http/stored.js";

interface Refusal {
  name: string;
  status: number;
  headers: Record<string, string>;
  body: object;
}

interface Vectors {
  defaults: { stored_headers: string[] };
  keys: { headers: string[]; key: string }[];
  invalid_keys: { headers: string[]; why: string }[];
  identities: { caller: string; method: string; target: string; header: string; path: string; transaction_id: string }[];
  invalid_identities: { method: string; target: string; header: string; why: string; detail: string }[];
  fingerprints: { method: string; target: string; body: string; input_head: string; fingerprint: string }[];
  stored: {
    name: string;
    status: number;
    headers: [string, string][];
    body: string;
    extra_headers: string[];
    limit: number;
    streamed: boolean;
    stored: string;
  }[];
  readable: { name: string; stored: string; kind: string; status: number | null; headers: [string, string][]; body: string | null }[];
  statuses: { status: number; does: string }[];
  refusals: Refusal[];
  redirect: { status: number; headers: Record<string, string>; body: string };
}

const vectors = JSON.parse(readFileSync(new URL("../../../golden/http.json", import.meta.url), "utf8")) as Vectors;
const bytes = (base64: string) => Buffer.from(base64, "base64");

for (const { headers, key } of vectors.keys) {
  test(`a key is read as in every client: ${headers}`, () => assert.equal(parseKey(headers), key));
}

for (const { headers, why } of vectors.invalid_keys) {
  test(`a key is refused: ${why}: ${JSON.stringify(headers)}`, () => {
    assert.throws(() => parseKey(headers), KeyError);
    // As Node decodes what was sent in UTF-8.
    assert.throws(() => parseKey(headers.map((header) => Buffer.from(header).toString("latin1"))), KeyError);
  });
}

for (const { caller, method, target, header, path, transaction_id } of vectors.identities) {
  test(`a request has the id that it has in every client: ${transaction_id}`, () => {
    assert.equal(parseTarget(target).path, path);
    assert.equal(requestId(caller, method, path, parseKey([header])), transaction_id);
  });
}

for (const { method, target, header, why, detail } of vectors.invalid_identities) {
  test(`a request is refused: ${why}`, () => {
    const make = () => requestId("", method, parseTarget(target).path, parseKey([header]));
    assert.throws(make, (error) => {
      const { status, body } = answerTo(error, false)!;
      assert.deepEqual([status, (JSON.parse(body.toString()) as { detail: string }).detail], [400, detail]);
      return true;
    });
  });
}

test("a target in absolute form or in raw UTF-8 has the path of its usual form", () => {
  assert.deepEqual(parseTarget("http://shop.example:80/pay?a=1"), { path: "/pay", query: "a=1" });
  assert.equal(parseTarget("https://shop.example").path, "/");
  assert.equal(parseTarget(Buffer.from("/café").toString("latin1")).path, "/café");
});

for (const { method, target, body, input_head, fingerprint } of vectors.fingerprints) {
  test(`a request has the fingerprint that it has in every client: ${fingerprint.slice(0, 16)}`, () => {
    assert.equal(fingerprintOf(method, parseTarget(target), bytes(body)).toString("hex"), fingerprint);
    const input = [Buffer.from(`${input_head}${bytes(body).length}:`), bytes(body), Buffer.from(",")];
    assert.equal(createHash("sha256").update(Buffer.concat(input)).digest("hex"), fingerprint);
  });
}

for (const { name, status, headers, body, extra_headers, limit, streamed, stored } of vectors.stored) {
  test(`a response is stored as in every client: ${name}`, () => {
    const response = { status, headers, body: bytes(body), streamed };
    assert.equal(encodeStored(response, storedNames(extra_headers), limit).toString("latin1"), bytes(stored).toString("latin1"));
  });
}

test("the stored headers are those of every client", () => {
  assert.deepEqual([...storedNames()].sort(), vectors.defaults.stored_headers);
});

for (const { name, stored, kind, status, headers, body } of vectors.readable) {
  test(`a stored response is read as in every client: ${name}`, () => {
    const read = decodeStored(bytes(stored));
    if (kind === "unreadable") return assert.equal(read, undefined);
    assert.deepEqual(read, { status: status ?? undefined, headers, body: body === null ? undefined : bytes(body) });
  });
}

for (const { status, does } of vectors.statuses) {
  test(`a status means what it does in every client: ${status}`, () => assert.equal(outcomeOf(status), does));
}

const holder = { transactionId: "order", namespace: "", claimant: "me", claimTime: undefined, expireTime: undefined, completionTime: undefined };
const ERRORS: Record<string, unknown> = {
  "in-progress": new DuplicateTransactionError({ ...holder, state: "in progress", result: Buffer.alloc(0) }),
  "response-not-stored": new DuplicateTransactionError({ ...holder, state: "completed", result: Buffer.from("paid 5") }),
  "key-reused": new PayloadMismatchError({ ...holder, state: "completed", result: Buffer.alloc(0) }),
  "key-invalid": new KeyError(),
  "body-too-large": new BodyTooLargeError(77),
  unavailable: new UnavailableError("away", { code: 14, reason: "", applied: "unknown" }),
};

for (const { name, status, headers, body } of vectors.refusals) {
  test(`a refusal is that of every client: ${name}`, () => {
    const answer = answerTo(ERRORS[name], "Idempotency-Replayed")!;
    assert.equal(answer.status, status);
    assert.deepEqual(lowerCase(answer.headers), headers);
    assert.deepEqual(JSON.parse(answer.body.toString()), JSON.parse(JSON.stringify(body).replace("{limit}", "77")));
  });
}

test("a response that is not stored but has a location is a redirect", () => {
  const { status, headers, body } = vectors.redirect;
  const result = Buffer.from("dedup-http/2 201 no-body\nlocation: /rewards/17\n\n");
  const answer = answerTo(new DuplicateTransactionError({ ...holder, state: "completed", result }), "Idempotency-Replayed")!;
  assert.deepEqual([answer.status, lowerCase(answer.headers), answer.body.toString()], [status, headers, body]);
});

test("an invalid option of the guard is an error of the application, not a response", () => {
  assert.equal(answerTo(InvalidRequestError.of("namespace", "must match"), false), undefined);
});

function lowerCase(headers: readonly (readonly [string, string])[]): Record<string, string> {
  return Object.fromEntries(headers.map(([name, value]) => [name.toLowerCase(), value]));
}
