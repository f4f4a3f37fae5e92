// The page: what is typed goes to ./api/stream-chat, what comes back is shown as it comes.
//
// The key lives in its field and nowhere else. All addresses are relative to the page, which may be anywhere.

import { endsChat, stream, textOf } from "./relay-client.js";
import { duration } from "./page-gaps.js";
import { watchHealth } from "./page-health.js";
import { copy, Log } from "./page-log.js";
import { Measure } from "./page-measure.js";

const $ = (id) => document.getElementById(id);
const [prompt, send, clear, model, key, status] = ["prompt", "send", "clear", "model", "key", "status"].map($);
const log = new Log($("log"), $("empty"), $("to-end"));
const address = new URL("./api/stream-chat", document.baseURI);
address.search = address.hash = "";

const DOUBLE_CLICK = 400; // ms in which a second click on "Send" is not meant for "Stop"
// Why a model stopped, where that was not the end of what it had to say (OpenAI's name, Anthropic's).
const CUT_SHORT = /"(?:finish_reason|stop_reason)":\s*"(length|max_tokens|content_filter|refusal)"/;

let running = null; // { turn, measure, abort }
let lastPrompt = "";

const say = (text) => (status.textContent = text);

async function ask(text) {
  lastPrompt = text;
  const body = { messages: log.messages(text) };
  const headers = {};
  if (model.value.trim()) body.model = model.value.trim();
  if (key.value.trim()) headers.Authorization = `Bearer ${key.value.trim()}`;

  const abort = new AbortController();
  const [turn, measure] = [log.begin(text), new Measure()];
  const mine = (running = { turn, measure, abort });
  showRunning();
  say("Waiting for the answer.");
  let why = "";
  try {
    await stream(address.href, {
      body,
      headers,
      signal: abort.signal,
      endMarker: endsChat,
      maxReconnectAttempts: 0, // a question asked twice is paid for twice; "Try again" is a person's decision
      onMessage: (message) => {
        if (measure.events === 0) say("Answer started.");
        measure.event();
        why = CUT_SHORT.exec(message.data)?.[1] ?? why;
        if (!endsChat(message)) turn.text.add(textOf(message));
      },
      onProgress: (progress) => measure.progress(progress),
    });
    finish(mine, "complete", completeNote(turn, why));
  } catch (error) {
    if (!abort.signal.aborted) fail(mine, error);
    else finish(mine, "stopped", turn.text.text ? "You stopped this answer." : "You stopped it before any text came.");
  }
}

function completeNote(turn, why) {
  if (why === "length" || why === "max_tokens") return "The model stopped here because its limit of tokens was reached.";
  if (why) return `The model stopped here; the reason it gives: ${why}.`;
  return turn.text.text ? "" : "The answer is complete and has no text.";
}

function finish(mine, state, note, why = "", retry = null) {
  const { turn, measure } = mine;
  measure.end();
  turn.end(state, note, why, retry);
  log.follow();
  if (running !== mine) return;
  running = null;
  showRunning();
  const came = `${measure.events.toLocaleString("en")} ${measure.events === 1 ? "event" : "events"} in ${duration(measure.seconds * 1000)}`;
  if (state === "complete") say(`Answer complete: ${came}.`);
  else if (state === "stopped") say(`Answer stopped, incomplete: ${came}.`);
}

function fail(mine, error) {
  const { turn } = mine;
  const some = turn.text.text !== "";
  const number = error?.status >= 400 ? ` (status ${error.status})` : "";
  const what = some ? "Incomplete, the answer broke off:" : `The request failed${number}:`;
  finish(mine, "failed", what, error?.message || "No reason was given.", () => again(turn));
  say(some ? "Answer failed, incomplete." : "Answer failed.");
  if (error?.status === 401) {
    $("options").open = true;
    key.focus();
    say("Answer failed: a key is needed. Put it into Client key and press Enter.");
  }
}

function again(turn) {
  if (running) return;
  log.remove(turn);
  prompt.focus({ preventScroll: true });
  ask(turn.prompt);
}

/** Send what is typed; from the key's field, with nothing typed, once more what failed for want of a key. */
function submit() {
  if (running) return;
  const text = prompt.value;
  if (text.trim()) {
    prompt.value = "";
    ask(text);
  } else {
    const last = log.turns.at(-1);
    if (last?.state === "failed" && document.activeElement !== prompt) again(last);
    else say("Type a prompt first.");
  }
  showCurl();
}

function stop() {
  running?.abort.abort();
}

function showRunning() {
  send.textContent = running ? "Stop" : "Send";
  send.dataset.since = String(performance.now());
  clear.disabled = log.turns.length === 0;
}

// In the shell's single quotes everything is itself but the quote.
const quoted = (text) => (/^[\w./:-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`);

function showCurl() {
  const body = { prompt: prompt.value.trim() || lastPrompt || "Hello" };
  if (model.value.trim()) body.model = model.value.trim();
  const lines = ["curl -N", quoted(address.href), "-H 'Content-Type: application/json'"];
  if (key.value) lines.push('-H "Authorization: Bearer $RELAY_CLIENT_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(body))}`);
  $("curl").textContent = lines.join(" \\\n  ");
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) submit();
  else if (performance.now() - Number(send.dataset.since) > DOUBLE_CLICK) stop();
});

for (const field of [prompt, model, key]) {
  field.addEventListener("input", showCurl);
  field.addEventListener("keydown", (event) => {
    // An input method's Enter chooses a word; 229 is how Safari says so.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    submit();
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && running) {
    event.preventDefault();
    stop();
  }
});

clear.addEventListener("click", () => {
  stop();
  running = null;
  for (const turn of log.turns) log.remove(turn);
  say("Conversation cleared.");
  showRunning();
  prompt.focus();
});

$("copy-curl").addEventListener("click", (event) => copy($("curl").textContent, event.currentTarget));

// Where there is room the measurements are open from the start; where there is not they wait to be asked for (and are
// not there to be closed, which would move all else).
const room = matchMedia("(min-width: 56rem)");
const unfold = () => ["numbers", "elsewhere"].forEach((id) => ($(id).open = room.matches));
room.addEventListener("change", unfold);
unfold();

// iOS lays its keyboard over the page instead of making the page shorter.
const view = window.visualViewport;
view?.addEventListener("resize", () => {
  if (view.scale === 1) document.documentElement.style.setProperty("--height", `${view.height}px`);
});

$("no-script").remove();
watchHealth($("health"), $("health-text"));
showCurl();
send.disabled = false;
