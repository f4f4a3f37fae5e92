// The conversation on the page: turns of a prompt and its answer, and the scrolling.

import { AnswerText } from "./page-answer.js";

const NEAR = 48; // px; a reader so close to the end is at the end

/** Copy text; without `navigator.clipboard` (plain HTTP on a network) by way of a selection. */
export async function copy(text, button) {
  const before = (button.dataset.label ??= button.textContent);
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "unseen";
    field.setAttribute("aria-hidden", "true");
    document.body.append(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.textContent = done ? "Copied" : "Cannot copy here";
  setTimeout(() => (button.textContent = before), 1500);
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function button(label, action) {
  const made = element("button", "small", label);
  made.type = "button";
  made.addEventListener("click", () => action(made));
  return made;
}

/** One prompt and its answer. `state`: "streaming", then "complete", "stopped" or "failed". */
export class Turn {
  constructor(prompt, log) {
    this.prompt = prompt;
    this.state = "streaming";
    this.asked = element("article", "turn asked");
    const said = element("div", "text", prompt);
    said.dir = "auto";
    this.asked.append(element("h3", "who", "You"), said);

    this.answer = element("article", "turn answer");
    this.answer.dataset.state = "streaming";
    this.answer.setAttribute("aria-busy", "true");
    this.who = element("h3", "who", "Answer");
    this.said = element("div", "text");
    this.tools = element("div", "tools");
    this.answer.append(this.who, this.said, this.tools);
    this.text = new AnswerText(this.said, () => log.follow());
  }

  /**
   * @param {"complete" | "stopped" | "failed"} state
   * @param {string} note what a person should know of the end; may be empty
   * @param {string} why what the relay or the upstream said of it, as it is
   * @param {(() => void) | null} retry asks the same once more
   */
  end(state, note, why = "", retry = null) {
    this.text.show();
    this.state = state;
    this.answer.dataset.state = state;
    this.answer.removeAttribute("aria-busy");
    const whole = state === "complete";
    const some = this.text.text !== "";
    if (!whole) this.who.textContent = some ? "Answer, incomplete" : "No answer";
    if (note) {
      const shown = element("p", whole ? "note" : "note fault", why);
      shown.prepend(why ? element("strong", "", note) : note);
      this.said.after(shown);
    }
    if (some) this.tools.append(button(whole ? "Copy" : "Copy what came", (made) => copy(this.text.text, made)));
    if (retry) this.tools.append(button("Try again", retry));
  }
}

export class Log {
  constructor(log, empty, toEnd) {
    this.log = log;
    this.empty = empty;
    this.toEnd = toEnd;
    this.turns = [];
    this.atEnd = true;
    log.addEventListener("scroll", () => this.look(), { passive: true });
    toEnd.addEventListener("click", () => {
      this.jump();
      log.focus({ preventScroll: true });
    });
    new ResizeObserver(() => this.follow()).observe(log);
  }

  look() {
    this.atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < NEAR;
    this.toEnd.hidden = this.atEnd;
  }

  /** Stay at the end, if the reader is there. */
  follow() {
    if (this.atEnd) this.log.scrollTop = this.log.scrollHeight;
    else this.toEnd.hidden = false;
  }

  jump() {
    this.atEnd = true;
    this.follow();
    this.toEnd.hidden = true;
  }

  begin(prompt) {
    const turn = new Turn(prompt, this);
    this.turns.push(turn);
    this.empty.hidden = true;
    this.log.append(turn.asked, turn.answer);
    this.jump();
    return turn;
  }

  remove(turn) {
    this.turns = this.turns.filter((other) => other !== turn);
    turn.asked.remove();
    turn.answer.remove();
    this.empty.hidden = this.turns.length > 0;
    this.look();
  }

  /** The messages of a request: what was said so far, and the next prompt. An answer without text says nothing. */
  messages(prompt) {
    const said = this.turns
      .filter((turn) => turn.text.text)
      .flatMap((turn) => [
        { role: "user", content: turn.prompt },
        { role: "assistant", content: turn.text.text },
      ]);
    return [...said, { role: "user", content: prompt }];
  }
}
