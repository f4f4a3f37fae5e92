// An answer's text on the page. Only text nodes: nothing in an answer is ever read as HTML.
//
// Thousands of events a second would be thousands of layouts; what comes between two frames is shown in one. The text
// stands in blocks, so that adding to its end does not lay out all of it again.

// Characters after which a new block begins at the next line's end.
const BLOCK = 2000;

export class AnswerText {
  /**
   * @param {HTMLElement} element where the text goes
   * @param {() => void} shown called after each change of what is shown
   */
  constructor(element, shown) {
    this.element = element;
    this.shown = shown;
    this.pending = [];
    this.pieces = [];
    this.node = null;
    this.frame = 0;
  }

  /** The whole text so far, shown or not. */
  get text() {
    if (this.pieces.length > 1) this.pieces = [this.pieces.join("")];
    return this.pieces[0] ?? "";
  }

  /** @param {string} text the next piece */
  add(text) {
    if (!text) return;
    this.pieces.push(text);
    this.pending.push(text);
    // A hidden page has no frames; the text waits, and the end shows it.
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  /** Show what has come so far, now. */
  show() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    if (!this.pending.length) return;
    let rest = this.pending.join("");
    this.pending = [];
    while (rest) {
      if (!this.node) this.begin();
      // A surrogate pair or a cluster of marks may be split over two events; one text node joins them again.
      const end = rest.indexOf("\n", Math.max(0, BLOCK - this.node.length));
      this.node.appendData(end < 0 ? rest : rest.slice(0, end + 1));
      rest = end < 0 ? "" : rest.slice(end + 1);
      if (end >= 0) this.node = null;
    }
    this.shown();
  }

  begin() {
    const block = document.createElement("div");
    block.dir = "auto";
    this.node = block.appendChild(document.createTextNode(""));
    this.element.append(block);
  }
}
