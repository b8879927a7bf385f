import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { InvalidRequestError, transactionId } from "../src/index.js";

interface Vectors {
  transaction_ids: { valid: { parts: string[]; id: string }[]; invalid: { parts: string[]; why: string }[] };
}

const vectors = JSON.parse(readFileSync(new URL("../../../golden_vectors.json", import.meta.url), "utf8")) as Vectors;

for (const { parts, id } of vectors.transaction_ids.valid) {
  test(`parts make the id that every client makes: ${JSON.stringify(parts).slice(0, 60)}`, () => {
    assert.deepEqual(Buffer.from(transactionId(...parts)), Buffer.from(id));
  });
}

for (const { parts, why } of vectors.transaction_ids.invalid) {
  test(`parts are refused: ${why}`, () => {
    assert.throws(() => transactionId(...parts), InvalidRequestError);
  });
}

for (const part of ["\ud800", "a\udc00b", "\ude00\ud83d"]) {
  test(`a lone surrogate is refused, since UTF-8 would make the same id of all: ${escape(part)}`, () => {
    assert.throws(() => transactionId("a", part), InvalidRequestError);
  });
}

for (const part of [undefined, null, 7]) {
  test(`a part that is no string is refused: ${part}`, () => {
    assert.throws(() => transactionId("a", part as unknown as string), InvalidRequestError);
  });
}
