// The parser and textOf(), without a network: `node --test tests/js/parser.test.mjs`.
import assert from "node:assert/strict";
import test from "node:test";

import { EventParser, stream, textOf } from "../../relay/static/relay-client.js";

const bytes = (text) => new TextEncoder().encode(text);
const parse = (pieces, parser = new EventParser()) => pieces.flatMap((piece) => parser.push(piece));
const data = (pieces) => parse(pieces.map(bytes)).map((message) => message.data);
const message = (text, event = "message", id = "") => ({ event, data: text, id });

test("every line end ends a line, and a CR at the end of a piece does so at once", () => {
  for (const end of ["\n", "\r", "\r\n"]) assert.deepEqual(data([`data: a${end}data: b${end}${end}`]), ["a\nb"]);
  assert.deepEqual(data(["data: 1\r\ndata: 2\rdata: 3\n\r\ndata: 4\n\rdata: 5\r\n\n"]), ["1\n2\n3", "4", "5"]);
  const parser = new EventParser();
  assert.deepEqual(parser.push(bytes("data: a\r\r")), [message("a")]);
  assert.deepEqual(parser.push(bytes("\ndata: b\n\n")), [message("b")]);
});

test("a CRLF between two pieces, with an empty one between them, is one line end", () => {
  assert.deepEqual(data(["data: a\r", "", "\ndata: b\r", "\n\r", "\n"]), ["a\nb"]);
});

test("a byte order mark is left out at the start and nowhere else", () => {
  const mark = [0xef, 0xbb, 0xbf];
  const whole = Uint8Array.from([...mark, ...bytes("data: a\n\n"), ...mark, ...bytes("data: b\n\ndata: c\n\n")]);
  assert.deepEqual(parse([whole]), [message("a"), message("c")]);
  assert.deepEqual(parse([...whole].map((byte) => Uint8Array.of(byte))), [message("a"), message("c")]);
  assert.deepEqual(parse([Uint8Array.from([...mark, ...mark]), bytes("data: a\n\n")]), []);
});

test("UTF-8 may be cut anywhere, and ill bytes become U+FFFD", () => {
  const whole = bytes("data: ě€🐘\n\n");
  for (let cut = 0; cut <= whole.length; cut += 1) {
    assert.deepEqual(parse([whole.slice(0, cut), whole.slice(cut)]), [message("ě€🐘")]);
  }
  const ill = Uint8Array.from([...bytes("data: "), 0xff, 0xc0, 0x80, 0xe2, 0x82, ...bytes("x\n\n")]);
  assert.deepEqual(parse([ill]), [message("\ufffd\ufffd\ufffd\ufffdx")]);
});

test("fields: one space is dropped, names are exact, what is unknown is left out", () => {
  assert.deepEqual(data(["data:a\n\ndata: b\n\ndata:  c\n\n data: d\n\ndata: e \n\nDATA: f\n\ndatum: g\n\n"]), [
    "a", "b", " c", "e ",
  ]);
  assert.deepEqual(data(["data:\n\ndata\n\ndata\ndata\n\nevent: x\n\ndata: a:b: c\n\n"]), ["", "", "\n", "a:b: c"]);
  assert.deepEqual(data(["data: \u2028\u2029\x85\x0b\x0c\x1c\0\n\n"]), ["\u2028\u2029\x85\x0b\x0c\x1c\0"]);
});

test("the event's name holds for one event, the id until the next", () => {
  assert.deepEqual(data([""]), []);
  assert.deepEqual(
    parse([bytes("event: a\nid: 1\ndata: x\n\ndata: y\n\nid: 2\n\ndata: z\n\nid: a\0b\ndata: n\n\nid\nevent\ndata: e\n\n")]),
    [message("x", "a", "1"), message("y", "message", "1"), message("z", "message", "2"), message("n", "message", "2"),
      message("e")],
  );
  const parser = new EventParser();
  parser.push(bytes("id: 1\ndata: x\n\nid: 2\ndata: unfinished"));
  assert.equal(parser.lastEventId, "1");
  assert.deepEqual(parse([bytes("data: a\n\n")], new EventParser("before")), [message("a", "message", "before")]);
});

test("retry takes digits only, and comments are counted", () => {
  const parser = new EventParser();
  parser.push(bytes(": one\n:\nretry: 2000\nretry: 1x\nretry: -1\nretry\nretry: 1.5\n: two\n\n"));
  assert.deepEqual([parser.retry, parser.comments], [2000, 3]);
});

test("an unfinished last event is none", () => {
  assert.deepEqual(data(["data: a\n\ndata: b\n", "data: c"]), ["a"]);
});

test("a line of 32 MiB in small pieces, and a million lines, take no more than their time", () => {
  const piece = bytes("x".repeat(1024));
  const parser = new EventParser();
  const began = performance.now();
  parser.push(bytes("data: "));
  for (let n = 0; n < 32 * 1024; n += 1) parser.push(piece);
  const [{ data: long }] = parser.push(bytes("\n\n"));
  assert.equal(long.length, 32 * 1024 * 1024);
  const [lines] = parse([bytes("data: x\n".repeat(1_000_000)), bytes("\n")]);
  assert.equal(lines.data.length, 1_999_999);
  // Looking through all of it again for each piece would be 512 GiB, and take minutes.
  assert.ok(performance.now() - began < 20_000);
});

test("any bytes in any pieces give the same messages as in one", () => {
  // A linear congruential generator: a failure names its seed, and comes again with it.
  const random = (seed) => () => (seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0) / 2 ** 32;
  const words = ["data", "event", "id", "retry", ":", ": ", " ", "\n", "\r", "\r\n", "\n\n", "\0", "é", "🐘", "\ufeff", "x", "10"];
  for (let seed = 1; seed <= 4000; seed += 1) {
    const next = random(seed);
    const pick = (most) => Math.floor(next() * most);
    const parts = [];
    for (let n = pick(60); n >= 0; n -= 1) parts.push(pick(12) ? bytes(words[pick(words.length)]) : Uint8Array.of(pick(256)));
    const whole = Uint8Array.from(parts.flatMap((part) => [...part]));
    const pieces = [];
    for (let at = 0; at < whole.length; ) {
      const end = at + pick(pick(4) ? 4 : 40);
      pieces.push(whole.slice(at, end));
      at = end;
    }
    const [one, many] = [new EventParser(), new EventParser()];
    assert.deepEqual(parse(pieces, many), parse([whole], one), `seed ${seed}`);
    assert.deepEqual([many.retry, many.comments, many.lastEventId], [one.retry, one.comments, one.lastEventId], `seed ${seed}`);
    assert.deepEqual(parse([whole]), byTheBook(whole), `seed ${seed}`);
  }
});

/** The standard's words in its order, with the whole stream at hand: section 9.2.6, line by line. */
function byTheBook(whole) {
  const text = new TextDecoder("utf-8", { ignoreBOM: false }).decode(whole);
  const lines = text.split(/\r\n|\n|\r/);
  lines.pop(); // what no line end has ended
  const messages = [];
  let [buffer, type, id, lastId] = ["", "", "", ""];
  for (const line of lines) {
    if (line === "") {
      lastId = id;
      if (buffer !== "") messages.push(message(buffer.replace(/\n$/, ""), type || "message", lastId));
      [buffer, type] = ["", ""];
      continue;
    }
    const [, field, value] = /^([^:]*)(?:: ?([^]*))?$/.exec(line);
    if (field === "event") type = value ?? "";
    if (field === "data") buffer += `${value ?? ""}\n`;
    if (field === "id" && !(value ?? "").includes("\0")) id = value ?? "";
  }
  return messages;
}

test("textOf finds the text of every shape, and nothing else", () => {
  const json = (object, event) => message(JSON.stringify(object), event);
  const table = [
    [json({ object: "chat.completion.chunk", choices: [{ index: 0, delta: { content: "a" } }] }), "a"],
    [json({ choices: [{ index: 1, delta: { content: "b" } }, { index: 0, delta: { content: "a" } }] }), "a"],
    [json({ choices: [{ index: 1, delta: { content: "b" } }] }), ""],
    [json({ choices: [{ delta: { content: [{ type: "thinking", thinking: [] }, { type: "text", text: "a" }] } }] }), "a"],
    [json({ choices: [{ index: 0, delta: { content: null, reasoning: "r" } }] }), ""],
    [json({ choices: [], usage: {} }), ""],
    [json({ choices: [{ index: 0, delta: { content: null, refusal: "no" } }] }), "no"],
    [json({ type: "response.refusal.delta", delta: "no" }, "response.refusal.delta"), "no"],
    [json({ choices: [null] }), ""],
    [json({ object: "text_completion", choices: [{ index: 0, text: "a" }] }), "a"],
    [json({ type: "response.output_text.delta", delta: "a" }, "response.output_text.delta"), "a"],
    [json({ type: "response.output_text.done", text: "a" }, "response.output_text.done"), ""],
    [json({ type: "response.function_call_arguments.delta", delta: "a" }, "response.function_call_arguments.delta"), ""],
    [json({ type: "content_block_delta", delta: { type: "text_delta", text: "a" } }, "content_block_delta"), "a"],
    [json({ type: "content_block_delta", delta: { type: "thinking_delta", thinking: "a" } }, "content_block_delta"), ""],
    [json({ type: "content_block_start", content_block: { type: "text", text: "" } }, "content_block_start"), ""],
    [json({ type: "message_stop" }, "message_stop"), ""],
    [json({ type: "ping" }, "ping"), ""],
    [message("[DONE]"), ""],
    [message("a piece\nof text"), "a piece\nof text"],
    [message("{"), "{"],
    [message("{}"), "{}"],
    [message('{"a": 1}'), '{"a": 1}'],
    [message("12"), "12"],
    [message("done", "done"), ""],
    [message("id-1", "stream_id"), ""],
    [json({ content: "a" }, "batch"), "a"],
    [json({ content: "" }, "final"), ""],
  ];
  for (const [given, text] of table) assert.equal(textOf(given), text, JSON.stringify(given));
  assert.equal(textOf(message('{"choices": []}'), { plain: true }), '{"choices": []}');
  assert.equal(textOf(message("", "done"), { plain: true }), "");
});

test("a line or an event without end is an error, and not all of the memory", () => {
  const mebi = "x".repeat(1024 * 1024);
  for (const piece of [mebi, `data: ${mebi}\n`]) {
    const parser = new EventParser();
    const endless = () => {
      for (let count = 0; count < 70; count += 1) parser.push(piece);
    };
    assert.throws(endless, { name: "StreamError", code: "too_large" });
  }
});

test("an id that no server would take back is not remembered", () => {
  const parser = new EventParser();
  parser.push(bytes(`id: 7\ndata: a\n\nid: ${"8".repeat(100_000)}\ndata: b\n\n`));
  assert.equal(parser.lastEventId, "7");
});

test("a redirect is not followed, and the error names where it leads, without secrets", async () => {
  const asked = [];
  const fetch = async (url, init) => {
    asked.push([url, init.redirect]);
    return new Response(null, { status: 307, headers: { Location: "https://me:pw@other.example/v1?key=secret" } });
  };
  const failure = await stream("http://relay.test/v1", { fetch, body: {} }).catch((error) => error);
  assert.deepEqual([failure.code, failure.status], ["redirect", 307]);
  assert.match(failure.message, /https:\/\/other\.example\/v1,/);
  assert.doesNotMatch(failure.message, /secret|pw/);
  assert.deepEqual(asked, [["http://relay.test/v1", "manual"]]);
});
