/*
 * Reads event streams, in browsers and in Node 18 and newer. One ES module, no dependency, no build step; the types are
 * in relay-client.d.ts. It knows events, not what is in them: only textOf(), the error frames and the end of a chat read
 * their data.
 *
 *   for await (const message of stream("/v1/chat/completions", {body: {…}, endMarker: "[DONE]"})) …
 *   const end = await stream(url, {onMessage});
 *
 * stream(url, options) starts at once. What it returns is a promise of the end (then, catch, finally) and an async
 * iterator of the same messages, {event, data, id}. (Being thenable, it is awaited when an async function returns it:
 * return it in an object instead.)
 *
 * - With a body it is a POST (an object is sent as JSON), else a GET.
 * - The end is a clean end of the answer or, with an endMarker, the message that it names (it is delivered, and is the
 *   last); a clean end without it is a "cut". A clean end is never a reason to ask again, unlike with EventSource; for
 *   a feed whose server closes now and then, say `endMarker: () => false` and a maxReconnectAttempts.
 * - A chat's answer that has said why it stopped is whole. With `endMarker: "[DONE]"` or `endMarker: endsChat` it has 2 s
 *   more for its usage and its end mark; then it is done without them, and the connection is closed.
 * - A failure is a StreamError: the iterator throws it after the last message, the promise rejects, onError gets it.
 *   Exactly one of onDone and onError is called. If nobody listens at all, it is an unhandled rejection.
 * - It asks again, after a growing random wait, only where that cannot make an answer twice: a GET (with
 *   Last-Event-ID), or a POST that was refused (429, 503) or to which no answer came at all. A browser does not say
 *   whether a request without an answer had been sent; leave maxReconnectAttempts at 0 where even that is too much.
 *   `x-should-retry: false` and a 204 forbid it; a 204 is a good end only where nothing is missing. The count begins
 *   anew after a connection that brought messages for 30 s.
 * - Chromium's fetch throws away what it has received and the page has not read when the connection breaks. The relay
 *   waits a quarter of a second before it cuts; a page that is busy for longer may miss its error frame: a "cut" then.
 * - Leaving the iterator (break), abort() and options.signal close the connection, and the relay then closes its own.
 * - Messages wait for an iterator as long as it takes; beyond 8 MiB of them the connection is not read, and TCP slows
 *   the sender down. For one that has not come yet no more than that is kept either: it is told so, by a TypeError.
 *   With an onMessage or onText, an iterator gets what comes after it was made, so that nothing piles up.
 *
 * Rules: https://html.spec.whatwg.org/multipage/server-sent-events.html
 */

const STALL = 45_000; // ms: three of the relay's heartbeats
const FIRST_WAIT = 1_000; // ms, until the stream's own `retry:` says otherwise
const LEAST_FIRST_WAIT = 50; // ms: `retry: 0` is not meant as a loop
const LONGEST_WAIT = 30_000; // ms
const LONGEST_RETRY_AFTER = 120; // s; who is told to come back later than that is not kept waiting unknowingly
const MOST_WAITING = 8 * 1024 * 1024; // characters that wait for an iterator
const MOST_ERROR = 64 * 1024; // bytes read of an error's body
const MOST_EVENT = 64 * 1024 * 1024; // characters of one event, or of a line: pictures included
const MOST_ID = 1024; // characters: a longer id makes a header that servers refuse
const LAST_MARK = 2_000; // ms that an answer which has said why it stopped has for its end mark, and for its usage
const LINGER = 250; // ms for the end of the body to come behind the end marker, so that its connection is used again
const LONGEST_TIMER = 2 ** 31 - 1; // ms; setTimeout takes more for 0

const NO_MORE = 204; // EventSource does not come back after it either
const REFUSED = new Set([429, 503]); // nothing was begun
const FAILED_FOR_NOW = new Set([429, 502, 503, 504]);
const LAST_EVENTS = ["message_stop", "response.completed", "response.incomplete"]; // Anthropic's, and of responses
const CUT_BY_RELAY = new Set(["drained", "idle_timeout", "upstream_cut"]); // codes of its error frames

const now = () => performance.now();

/** What went wrong. `code` tells what it was; see relay-client.d.ts for the list. */
export class StreamError extends Error {
  constructor(message, { code = "error", status, requestId, retryAfter, cause } = {}) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "StreamError";
    this.code = code;
    this.status = status;
    this.requestId = requestId;
    this.retryAfter = retryAfter;
  }
}

/** Turns bytes into messages by the WHATWG rules, however they are cut. An unfinished last event is not one. */
export class EventParser {
  #decoder = new TextDecoder(); // drops the BOM at the start; ill bytes become U+FFFD
  #line = []; // the unfinished line in pieces, which are not searched again: long lines cost linear time
  #lineSize = 0; // characters in them
  #afterCR = false;
  #data = "";
  #event = "";
  #id;

  /** The id that a reconnect sends as Last-Event-ID. */
  lastEventId;
  /** What the stream has asked for between connections, in ms; undefined: nothing. */
  retry = undefined;
  /** Comment lines so far: heartbeats. */
  comments = 0;

  constructor(lastEventId = "") {
    this.lastEventId = this.#id = lastEventId;
  }

  /** The messages that these bytes (or, for a stream that is text already, this string) complete. */
  push(chunk) {
    const text = typeof chunk === "string" ? chunk : this.#decoder.decode(chunk, { stream: true });
    const messages = [];
    let start = 0;
    if (this.#afterCR && text !== "") {
      this.#afterCR = false;
      if (text[0] === "\n") start = 1;
    }
    let lf = text.indexOf("\n", start);
    let cr = text.indexOf("\r", start);
    while (lf >= 0 || cr >= 0) {
      const end = lf < 0 || (cr >= 0 && cr < lf) ? cr : lf;
      let line = text.slice(start, end);
      if (this.#line.length > 0) {
        line = this.#line.join("") + line;
        this.#line = [];
        this.#lineSize = 0;
      }
      start = end + 1;
      if (end === cr) {
        if (start === lf) start += 1;
        else if (start === text.length) this.#afterCR = true; // its LF may come yet, and is none of its own then
        cr = text.indexOf("\r", start);
      }
      if (lf >= 0 && lf < start) lf = text.indexOf("\n", start);
      const message = line === "" ? this.#dispatch() : this.#field(line);
      if (message) messages.push(message);
    }
    if (start < text.length) {
      this.#line.push(text.slice(start));
      this.#lineSize += text.length - start;
      this.#check(this.#lineSize);
    }
    return messages;
  }

  /** Bounds what is kept of an event that does not end. */
  #check(size) {
    if (size + this.#data.length <= MOST_EVENT) return;
    this.#line = [];
    this.#data = "";
    throw new StreamError(`An event has more than ${MOST_EVENT / 1024 / 1024} Mi characters`, { code: "too_large" });
  }

  #field(line) {
    const colon = line.indexOf(":");
    if (colon === 0) {
      this.comments += 1;
      return;
    }
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (name === "data") {
      this.#check(value.length);
      this.#data += value + "\n";
    } else if (name === "event") this.#event = value;
    else if (name === "id" && value.length <= MOST_ID && !value.includes("\0")) this.#id = value;
    else if (name === "retry" && /^[0-9]+$/.test(value)) this.retry = Number(value);
  }

  #dispatch() {
    this.lastEventId = this.#id;
    const data = this.#data;
    const event = this.#event || "message";
    this.#data = this.#event = "";
    return data === "" ? undefined : { event, data: data.slice(0, -1), id: this.lastEventId };
  }
}

function objectIn(text) {
  if (!/^\s*\{/.test(text)) return null;
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

const TEXT_OF_RESPONSES = ["response.output_text.delta", "response.refusal.delta"];
const OF_AN_API = ["choices", "object", "type", "id", "error", "usage", "candidates", "results", "model"];

/**
 * The text in a message of OpenAI's chat, completions and responses, of Anthropic's messages, or of the relay's own
 * /chat/stream; "" if it has none. A refusal is text, reasoning is not; of several choices it is the first. `plain`:
 * the data of a `message` is text whatever it looks like (/chat/stream, where a piece may be JSON itself).
 */
export function textOf({ event, data }, { plain = false } = {}) {
  if (plain && event === "message") return data;
  const object = objectIn(data);
  if (object === null) return event === "message" && data !== "[DONE]" ? data : "";
  if (event === "batch" || event === "final") return textIn(object.content);
  if (Array.isArray(object.choices)) {
    const choice = object.choices.find((each) => !each?.index);
    return textIn(choice?.delta?.content) || textIn(choice?.delta?.refusal) || textIn(choice?.text);
  }
  if (TEXT_OF_RESPONSES.includes(object.type)) return textIn(object.delta);
  if (object.type === "content_block_delta") {
    return object.delta?.type === "text_delta" ? textIn(object.delta.text) : "";
  }
  if (object.type === "content_block_start") return textIn(object.content_block?.text);
  return event === "message" && !OF_AN_API.some((key) => key in object) ? data : "";
}

// Mistral and others send content as a list of parts.
function textIn(content) {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return "";
  return content.map((part) => (part?.type === "text" && typeof part.text === "string" ? part.text : "")).join("");
}

/** Knows from a chat's messages, one by one, whether it has said why it stopped: each choice of it that has begun. */
function wholeChat() {
  const choices = new Map(); // whether it has said so, by its index; APIs without choices have one
  const note = (index, why) => choices.set(index, choices.get(index) || (typeof why === "string" && why !== ""));
  return ({ data }) => {
    const object = objectIn(data);
    if (Array.isArray(object?.choices)) object.choices.forEach((each) => note(each?.index ?? 0, each?.finish_reason));
    else if (object?.type === "message_delta") note(0, object.delta?.stop_reason);
    else if (LAST_EVENTS.includes(object?.type)) note(0, object.type);
    return choices.get(0) === true && [...choices.values()].every(Boolean);
  };
}

/** What an error's JSON says: `{"error": {…}}`, `{"error": "…"}`, `{"response": {"error": {…}}}`, or the error itself. */
function toldBy(text) {
  const object = objectIn(text);
  const error = object?.error ?? object?.response?.error ?? object ?? {};
  if (typeof error === "string") return { message: error };
  const string = (value) => (value === undefined || value === null || value === "" ? undefined : String(value));
  return {
    message: typeof error.message === "string" && error.message !== "" ? error.message : undefined,
    code: string(error.code) ?? (error.type === "error" ? undefined : string(error.type)),
    requestId: string(error.request_id ?? object?.request_id),
  };
}

/** The error that a message is: `event: error`, OpenAI's unnamed `data: {"error": …}`, or its `response.failed`. */
function errorFrame({ event, data }, requestId) {
  if (event !== "error" && event !== "response.failed") {
    if (event !== "message" || !data.includes('"error"') || !objectIn(data)?.error) return null;
  }
  const told = toldBy(data);
  const message = told.message ?? (objectIn(data) === null && data.trim() ? data : "The stream reports an error");
  return new StreamError(message, { code: told.code, requestId: told.requestId ?? requestId });
}

async function httpError(response, requestId) {
  let text = "";
  try {
    const reader = response.body?.getReader();
    const decoder = new TextDecoder();
    for (let bytes = 0; reader && bytes < MOST_ERROR; ) {
      const { done, value } = await reader.read();
      if (done) break;
      bytes += value.length;
      text += decoder.decode(value, { stream: true });
    }
    reader?.cancel().catch(() => {});
  } catch {
    // The status says enough.
  }
  if (isEventStream(response)) text = new EventParser().push(text)[0]?.data ?? "";
  const told = toldBy(text);
  const error = new StreamError(told.message ?? `HTTP ${response.status} ${response.statusText}`.trim(), {
    code: told.code ?? `http_${response.status}`,
    status: response.status,
    requestId: requestId ?? told.requestId,
    retryAfter: retryAfter(response.headers.get("Retry-After")),
  });
  return error;
}

const isRedirect = ({ type, status }) => type === "opaqueredirect" || [301, 302, 303, 307, 308].includes(status);

/** A redirect is not followed: what was sent, a key perhaps, is for the host that was named. */
function redirectError(response, requestId) {
  const location = response.headers.get("Location"); // a browser does not show it
  const place = location ? ` to ${location.split(/[?#]/)[0].replace(/\/\/[^/]*@/, "//").slice(0, 200)}` : "";
  const status = response.status || undefined;
  return new StreamError(`The answer is a redirect${place}, which is not followed: ask there if it is right`, {
    code: "redirect",
    status,
    requestId,
  });
}

/** Seconds; RFC 9110, section 10.2.3. */
function retryAfter(value) {
  if (value === null) return undefined;
  if (/^\s*\d+\s*$/.test(value)) return Number(value);
  const until = Date.parse(value);
  return Number.isNaN(until) ? undefined : Math.max(0, Math.ceil((until - Date.now()) / 1000));
}

const contentType = (response) => (response.headers.get("Content-Type") ?? "").split(";")[0].trim().toLowerCase();
const isEventStream = (response) => contentType(response) === "text/event-stream";

/** The promise's outcome, or a rejection as soon as the signal aborts. */
function unlessAborted(promise, signal) {
  return new Promise((resolve, reject) => {
    const aborted = () => reject(signal.reason);
    if (signal.aborted) aborted();
    signal.addEventListener("abort", aborted);
    Promise.resolve(promise)
      .then(resolve, reject)
      .finally(() => signal.removeEventListener("abort", aborted));
  });
}

const sleep = (ms, signal) => {
  let timer;
  const slept = new Promise((resolve) => (timer = setTimeout(resolve, ms)));
  return unlessAborted(slept, signal).finally(() => clearTimeout(timer));
};

/**
 * Calls `stalled` after `limit` ms (0: never) without a seen(), unless it is us who do not read. A page that has slept
 * first gets to read what has come meanwhile.
 */
function watchdog(limit, paused, stalled) {
  let last = now();
  let late = false;
  let due = 0;
  let timer;
  const arm = (ms) => {
    due = now() + ms;
    timer = setTimeout(check, Math.min(ms, LONGEST_TIMER));
  };
  const check = () => {
    const left = last + limit - now();
    if (paused()) arm(limit);
    else if (left > 0) arm(left);
    else if (now() - due > 1000 && !late) {
      late = true;
      arm(1000);
    } else stalled();
  };
  if (limit > 0) arm(limit);
  return {
    seen: () => {
      last = now();
      late = false;
    },
    stop: () => clearTimeout(timer),
  };
}

/** The next read, or within so many ms (Infinity: however long it takes) the end. */
async function readWithin(reader, ms) {
  if (ms === Infinity) return reader.read();
  if (ms <= 0) return { done: true };
  let timer;
  const late = new Promise((resolve) => (timer = setTimeout(resolve, ms, { done: true })));
  return Promise.race([reader.read(), late]).finally(() => clearTimeout(timer));
}

/** After the end marker: take the end of the body, which is on its way, and throw away what else comes. */
async function linger(reader, connection) {
  const timer = setTimeout(() => connection.abort(), LINGER);
  try {
    while (!(await reader.read()).done);
  } catch {
    // Whatever happens to it now.
  }
  clearTimeout(timer);
}

function requestInit({ body, headers, credentials }) {
  const init = { method: "GET", headers: new Headers(headers), cache: "no-store", redirect: "manual" };
  if (!init.headers.has("Accept")) init.headers.set("Accept", "text/event-stream");
  if (credentials !== undefined) init.credentials = credentials;
  if (body === undefined || body === null) return init;
  if (body instanceof ReadableStream) throw new TypeError("A ReadableStream cannot be sent: read it, and send that");
  init.method = "POST";
  init.body = body;
  if (typeof body === "string" || ArrayBuffer.isView(body)) return init;
  if ([ArrayBuffer, Blob, FormData, URLSearchParams].some((type) => body instanceof type)) return init;
  init.body = JSON.stringify(body);
  if (!init.headers.has("Content-Type")) init.headers.set("Content-Type", "application/json");
  return init;
}

/** Options without those that are undefined or null, which are as good as not given. */
function said(options) {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined && value !== null));
}

function withTicket(url, ticket) {
  const [address] = url.split("#");
  return `${address}${address.includes("?") ? "&" : "?"}ticket=${encodeURIComponent(ticket)}`;
}

/** A callback that nothing waits for; what it throws is the page's or the process' uncaught error. */
function report(callback, value) {
  try {
    callback?.(value);
  } catch (error) {
    queueMicrotask(() => {
      throw error;
    });
  }
}

/** Opens an event stream, at once. Throws a TypeError for an url, a header or a body that cannot be sent. */
export function stream(url, options = {}) {
  return new EventStream(url, options);
}

const DEFAULTS = { stallTimeout: STALL, maxReconnectAttempts: 0, errorFrames: true, textOf };

class EventStream {
  #url;
  #options;
  #init; // for fetch
  #abort = new AbortController();
  #parser = new EventParser();
  #comments = 0; // of the connections before
  #started = now();
  #bytes = 0;
  #events = 0;
  #attempt = 0;
  #firstByteMs = null;
  #text = "";
  #response = null;
  #requestId;
  #mayRepeat = true; // what the server said
  #broken = false; // an answer had begun and broke off
  #whole = false; // a chat's answer has said why it stopped

  #queue = []; // messages that wait for the iterator
  #taken = 0; // of those, how many it has got
  #queued = 0; // characters in them
  #forgotten = false; // they became too many before anybody iterated
  #iterators = 0;
  #waiting = []; // of next(), for a message
  #room = null; // of the reader, for room in the queue
  #ended = false;
  #error = null;
  #promise;
  #resolve;
  #reject;

  constructor(url, given) {
    const options = (this.#options = { ...DEFAULTS, ...said(given) });
    this.#url = String(url);
    this.#init = requestInit(options);
    // Says now, and where it was asked for, what fetch would say as if the network had failed.
    if (!options.fetch) new Request(this.#url, this.#init);
    this.#promise = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
    const { signal } = options;
    const follow = () => this.abort(signal.reason);
    if (signal?.aborted) follow();
    else signal?.addEventListener("abort", follow);
    this.#run().then(
      () => this.#settle(null),
      (error) => this.#settle(error),
    ).finally(() => signal?.removeEventListener("abort", follow));
  }

  /** Ends it, with a StreamError "aborted" for those who wait for it. Does nothing at the end. */
  abort(reason) {
    this.#abort.abort(reason);
    this.#room?.();
  }

  then(fulfilled, rejected) {
    return this.#promise.then(fulfilled, rejected);
  }

  catch(rejected) {
    return this.#promise.catch(rejected);
  }

  finally(settled) {
    return this.#promise.finally(settled);
  }

  get [Symbol.toStringTag]() {
    return "EventStream";
  }

  [Symbol.asyncIterator]() {
    if (this.#forgotten) throw new TypeError("More came before this iterator than is kept: iterate at once");
    this.#iterators += 1;
    this.#promise.catch(() => {}); // the iterator throws it
    let left = false;
    return {
      next: async () => {
        while (!left) {
          if (this.#queue.length > 0) return { done: false, value: this.#take() };
          if (this.#ended) {
            left = true;
            if (this.#error) throw this.#error;
            break;
          }
          await new Promise((resolve) => this.#waiting.push(resolve));
        }
        return { done: true, value: undefined };
      },
      return: async () => {
        left = true;
        this.#iterators -= 1;
        this.#queue = [];
        this.#taken = this.#queued = 0;
        this.abort();
        this.#wake();
        return { done: true, value: undefined };
      },
      [Symbol.asyncIterator]() {
        return this;
      },
    };
  }

  #take() {
    const message = this.#queue[this.#taken];
    this.#queue[this.#taken] = undefined;
    this.#taken += 1;
    if (this.#taken === this.#queue.length || this.#taken === 1024) {
      this.#queue.splice(0, this.#taken); // shift() for each would move all the others each time
      this.#taken = 0;
    }
    this.#queued -= message.data.length;
    if (this.#queued < MOST_WAITING / 2) this.#room?.();
    return message;
  }

  #wake() {
    for (const resolve of this.#waiting.splice(0)) resolve();
  }

  #settle(error) {
    this.#ended = true;
    this.#error = error;
    const { onDone, onError } = this.#options;
    if (error === null) {
      const end = this.#progress();
      if (this.#options.onText) end.text = this.#text;
      report(onDone, end);
      this.#resolve(end);
    } else {
      // Who aborted knows it; who has an onError or iterates is told.
      if (onError || this.#iterators > 0 || error.code === "aborted") this.#promise.catch(() => {});
      report(onError, error);
      this.#reject(error);
    }
    this.#wake();
  }

  #progress() {
    return {
      bytes: this.#bytes,
      events: this.#events,
      firstByteMs: this.#firstByteMs,
      elapsedMs: now() - this.#started,
      attempt: this.#attempt,
      heartbeats: this.#comments + this.#parser.comments,
      status: this.#response?.status,
      requestId: this.#requestId,
      lastEventId: this.#parser.lastEventId,
    };
  }

  /** Calls an option that is a function: what it throws is its own fault, and not the network's. */
  #call(name, ...values) {
    try {
      return this.#options[name]?.(...values);
    } catch (cause) {
      throw new StreamError(`${name} threw: ${cause}`, { code: "callback", cause });
    }
  }

  async #run() {
    for (let failures = 0; ; ) {
      const began = now();
      const events = this.#events;
      this.#attempt += 1;
      try {
        return await this.#connect();
      } catch (failure) {
        const { aborted, reason: cause } = this.#abort.signal;
        const about = { code: "aborted", cause, requestId: this.#requestId };
        const error = aborted ? new StreamError("The stream was aborted", about) : failure;
        if (this.#response?.ok) this.#broken = true;
        if (this.#events > events && now() - began > LONGEST_WAIT) failures = 0;
        failures += 1;
        if (failures > this.#options.maxReconnectAttempts || !this.#repeatable(error)) throw error;
        const wait = this.#wait(failures, error);
        this.#call("onReconnect", { attempt: this.#attempt + 1, waitMs: wait, error });
        await sleep(wait, this.#abort.signal).catch(() => {}); // an abort is noticed before anything is sent
      }
    }
  }

  /** Whether asking again cannot make an answer twice, and may help. */
  #repeatable(error) {
    if (!this.#mayRepeat || error.status === NO_MORE || error.retryAfter > LONGEST_RETRY_AFTER) return false;
    if (error.code === "ticket" || error.code === "network") return true;
    if (this.#init.method !== "GET") return !this.#response?.ok && REFUSED.has(error.status);
    if (error.code === "cut" || error.code === "stalled") return true;
    if (error.status !== undefined) return FAILED_FOR_NOW.has(error.status);
    return CUT_BY_RELAY.has(error.code);
  }

  /** "Full jitter": anything up to a limit that doubles each time, so that a crowd does not come back at once. */
  #wait(failures, error) {
    const first = Math.max(LEAST_FIRST_WAIT, this.#parser.retry ?? FIRST_WAIT);
    const random = Math.random() * Math.min(LONGEST_WAIT, first * 2 ** (failures - 1));
    return error.retryAfter === undefined ? random : error.retryAfter * 1000 + Math.random() * FIRST_WAIT;
  }

  /** One connection, to its proper end; throws a StreamError for any other. */
  async #connect() {
    const { fetch = globalThis.fetch, ticket, stallTimeout } = this.#options;
    const connection = new AbortController();
    const stop = () => connection.abort(this.#abort.signal.reason);
    this.#abort.signal.addEventListener("abort", stop);
    if (this.#abort.signal.aborted) stop();
    this.#response = null;
    this.#requestId = undefined;
    this.#mayRepeat = true;
    this.#whole = false;
    let stalled = false;
    let lingers = false;
    const paused = () => this.#room !== null || this.#whole;
    const watch = watchdog(stallTimeout, paused, () => {
      stalled = true;
      connection.abort();
    });
    try {
      connection.signal.throwIfAborted(); // while it waited for this attempt
      let url = this.#url;
      if (ticket !== undefined) url = withTicket(url, await this.#ticket(ticket, connection.signal));
      connection.signal.throwIfAborted();
      const headers = new Headers(this.#init.headers);
      // As EventSource does: the id's UTF-8 bytes.
      const id = this.#parser.lastEventId;
      if (id) headers.set("Last-Event-ID", String.fromCharCode(...new TextEncoder().encode(id)));
      watch.seen();
      const asked = fetch(url, { ...this.#init, headers, signal: connection.signal });
      const response = (this.#response = await unlessAborted(asked, connection.signal));
      watch.seen();
      this.#mayRepeat = response.headers.get("x-should-retry") !== "false";
      this.#requestId = response.headers.get("X-Request-ID") ?? undefined;
      if (isRedirect(response)) throw redirectError(response, this.#requestId);
      if (!response.ok) throw await httpError(response, this.#requestId);
      if (response.status === NO_MORE) {
        if (this.#options.endMarker === undefined && !this.#broken) return;
        const about = { code: "cut", status: NO_MORE, requestId: this.#requestId };
        throw new StreamError("The server has no more (204), and what came was not all", about);
      }
      if (!isEventStream(response)) {
        const type = contentType(response) || "of no type";
        const about = { code: "not_events", status: response.status, requestId: this.#requestId };
        throw new StreamError(`The answer is ${type} and no event stream (text/event-stream)`, about);
      }
      const reader = response.body?.getReader();
      lingers = await this.#read(reader, watch);
      if (lingers) linger(reader, connection).finally(() => this.#abort.signal.removeEventListener("abort", stop));
    } catch (cause) {
      if (cause instanceof StreamError) throw cause;
      const about = { cause, requestId: this.#requestId };
      if (stalled) throw new StreamError(`Nothing came for ${stallTimeout / 1000} s`, { ...about, code: "stalled" });
      if (this.#response !== null) throw new StreamError("The stream was cut off", { ...about, code: "cut" });
      throw new StreamError("No answer: the connection failed", { ...about, code: "network" });
    } finally {
      watch.stop();
      if (!lingers) {
        this.#abort.signal.removeEventListener("abort", stop);
        connection.abort(); // whatever is left of it
      }
    }
  }

  async #ticket(ticket, signal) {
    if (typeof ticket === "string") return ticket;
    try {
      return await unlessAborted(ticket({ signal }), signal);
    } catch (cause) {
      throw new StreamError(`No ticket: ${cause?.message ?? cause}`, { code: "ticket", cause });
    }
  }

  /** Deliver what comes. True: the end marker came and the body may go on. */
  async #read(reader, watch) {
    const { endMarker, errorFrames } = this.#options;
    const named = typeof endMarker !== "function";
    const isEnd = (message) => (named ? message.data === endMarker : this.#call("endMarker", message));
    const isWhole = endMarker === "[DONE]" || endMarker === endsChat ? wholeChat() : () => false;
    let until = Infinity; // when the answer is done without its end marker
    const { retry, lastEventId, comments } = this.#parser;
    this.#comments += comments;
    this.#parser = new EventParser(lastEventId);
    this.#parser.retry = retry;
    for (;;) {
      const { done, value } = reader ? await readWithin(reader, until - now()) : { done: true };
      this.#abort.signal.throwIfAborted();
      if (done) break;
      watch.seen();
      if (this.#firstByteMs === null && value.length > 0) this.#firstByteMs = now() - this.#started;
      this.#bytes += value.length;
      let ended = false;
      for (const message of this.#parser.push(value)) {
        const error = errorFrames ? errorFrame(message, this.#requestId) : null;
        if (error) throw error;
        this.#deliver(message);
        this.#abort.signal.throwIfAborted(); // by what it was delivered to
        ended = endMarker !== undefined && Boolean(isEnd(message));
        if (ended) break;
        this.#whole = isWhole(message);
        until = this.#whole ? Math.min(until, now() + LAST_MARK) : Infinity;
      }
      this.#call("onProgress", this.#progress());
      if (ended) return true;
      if (this.#iterators === 0 && this.#queued > MOST_WAITING) {
        this.#forgotten = true;
        this.#queue = [];
        this.#queued = 0;
      } else if (this.#queued > MOST_WAITING) {
        await new Promise((resolve) => (this.#room = resolve));
        this.#room = null;
        watch.seen();
      }
    }
    if (endMarker === undefined || this.#whole) return false;
    throw new StreamError("The stream ended before its end marker", { code: "cut", requestId: this.#requestId });
  }

  #deliver(message) {
    const { onMessage, onText } = this.#options;
    this.#events += 1;
    if (this.#iterators > 0 || !(onMessage || onText || this.#forgotten)) {
      this.#queue.push(message);
      this.#queued += message.data.length;
      this.#wake();
    }
    this.#call("onMessage", message);
    if (!onText) return;
    const text = this.#call("textOf", message);
    if (text === "") return;
    this.#text += text;
    this.#call("onText", text, this.#text);
  }
}

/** The end mark of a whole answer, such as /api/stream-chat passes on from upstream: OpenAI's, or Anthropic's. */
export const endsChat = ({ event, data }) => data === "[DONE]" || LAST_EVENTS.includes(event);

/** Chats with the relay's POST /api/stream-chat, which builds the chat request. Options as for stream(), and `url`. */
export class ChatStream {
  #url;
  #options;

  constructor(options = {}) {
    const chat = { url: "/api/stream-chat", endMarker: endsChat, maxReconnectAttempts: 5 };
    const { url, ...rest } = { ...chat, ...said(options) };
    this.#url = url;
    this.#options = rest;
  }

  /** `prompt`: a text, or the messages of a conversation (`[{role, content}, …]`). Gives what stream() gives. */
  stream(prompt, model, options = {}) {
    const body = Array.isArray(prompt) ? { messages: prompt } : { prompt };
    if (model) body.model = model;
    return stream(this.#url, { ...this.#options, ...said(options), body });
  }
}
