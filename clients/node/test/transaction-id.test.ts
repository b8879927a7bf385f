import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { InvalidRequestError, transactionId } from "../src/index.js";

interface Vectors {
  transaction_ids: { valid: { parts: string[]; id: string }[]; invalid: { parts: string[]; why: string }[] };
}

const vectors = JSON.parse(readFileSync(new URL("../../../golden_vectors.json", import.meta.url), "utf8")) as Vectors;

for (const { parts, id } of vectors.transaction_ids.valid) {
  test(`parts make the same id as in every client: ${JSON.stringify(parts).slice(0, 60)}`, () => {
    assert.deepEqual(Buffer.from(transactionId(...parts)), Buffer.from(id));
  });
}

for (const { parts, why } of vectors.transaction_ids.invalid) {
  test(`parts are rejected: ${why}`, () => {
    assert.throws(() => transactionId(...parts), InvalidRequestError);
  });
}

for (const part of ["\ud800", "a\udc00b", "\ude00\ud83d"]) {
  test(`a lone surrogate is rejected: ${escape(part)}`, () => {
    assert.throws(() => transactionId("a", part), InvalidRequestError);
  });
}

for (const part of [undefined, null, 7]) {
  test(`a part that is not a string is rejected: ${part}`, () => {
    assert.throws(() => transactionId("a", part as unknown as string), InvalidRequestError);
  });
}
