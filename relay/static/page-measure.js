// What is measured of one answer while it comes, and the part of the page that shows it.

import { duration, Gaps } from "./page-gaps.js";

const SHOW_EVERY = 200; // ms; figures that change with each frame cannot be read
const WINDOW = 1000; // ms that "events per second" looks back on while the answer comes

const $ = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class Measure {
  constructor() {
    this.began = performance.now();
    this.firstByte = null;
    this.first = null; // when the first event came, and the latest
    this.last = null;
    this.events = 0;
    this.bytes = 0;
    this.heartbeats = 0;
    this.ended = null;
    this.gaps = new Gaps();
    this.past = []; // [time, events] for the window
    this.shown = 0;
    this.timer = setInterval(() => this.show(), SHOW_EVERY);
    this.show();
  }

  event() {
    const now = performance.now();
    this.first ??= now;
    this.last = now;
    this.events += 1;
    this.gaps.add(now);
  }

  /** @param {{bytes: number, heartbeats: number, firstByteMs: number | null}} progress of the stream */
  progress({ bytes, heartbeats, firstByteMs }) {
    this.bytes = bytes;
    this.heartbeats = heartbeats;
    this.firstByte = firstByteMs;
  }

  end() {
    clearInterval(this.timer);
    this.ended = performance.now();
    this.show();
  }

  get seconds() {
    return ((this.ended ?? performance.now()) - this.began) / 1000;
  }

  /** Events per second: over the last second while the answer comes, over all of it afterwards. */
  rate(now) {
    if (this.ended !== null) {
      return this.events > 1 && this.last > this.first ? ((this.events - 1) / (this.last - this.first)) * 1000 : null;
    }
    this.past.push([now, this.events]);
    while (this.past.length > 2 && this.past[1][0] < now - WINDOW) this.past.shift();
    const [then, before] = this.past[0];
    return now - then < WINDOW / 4 ? null : ((this.events - before) / (now - then)) * 1000;
  }

  show() {
    const now = performance.now();
    const rate = this.rate(now);
    const perSecond = rate === null ? "–" : count(rate < 10 ? Math.round(rate * 10) / 10 : Math.round(rate));
    $("first-byte").textContent = this.firstByte === null ? "–" : duration(this.firstByte);
    $("rate").textContent = perSecond;
    $("events").textContent = count(this.events);
    $("bytes").textContent = size(this.bytes);
    $("heartbeats").textContent = count(this.heartbeats);
    $("time").textContent = `${this.seconds.toFixed(1)} s`;
    if (this.ended === null && calm.matches && now - this.shown < 2000) return;
    this.shown = now;
    $("gaps").textContent = this.gaps.sentence();
    $("bars").setAttribute("d", this.gaps.path());
  }
}

function count(number) {
  return number.toLocaleString("en");
}

function size(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  return bytes < 1024 * 1024 ? `${(bytes / 1024).toFixed(1)} KiB` : `${(bytes / 1024 / 1024).toFixed(1)} MiB`;
}
