// The gaps between events: their median, 95th percentile and longest, and a chart of the latest.

const SHOWN = 120; // bars, each one unit of the chart's width
const HEIGHT = 40; // of the chart: 10 units for each power of ten, from 1 ms to 10 s
// A histogram instead of every gap: any number of events takes the same memory. Bin n holds gaps below 0.1 ms * STEP**n,
// so that a percentile read from it is at most 5 % too high.
const STEP = 1.05;
const FIRST = 0.1;

export class Gaps {
  constructor() {
    this.bins = [];
    this.count = 0;
    this.longest = 0;
    this.latest = [];
    this.before = null;
  }

  /** @param {number} now when an event came, in ms */
  add(now) {
    if (this.before !== null) {
      const gap = now - this.before;
      const bin = gap <= FIRST ? 0 : Math.ceil(Math.log(gap / FIRST) / Math.log(STEP));
      this.bins[bin] = (this.bins[bin] ?? 0) + 1;
      this.count += 1;
      this.longest = Math.max(this.longest, gap);
      this.latest.push(gap);
      if (this.latest.length > SHOWN * 20) this.latest = this.latest.slice(-SHOWN);
    }
    this.before = now;
  }

  /** The gap in ms that the given part of all gaps (0 to 1) does not exceed. */
  percentile(part) {
    let left = part * this.count;
    for (const [bin, count] of this.bins.entries()) {
      left -= count ?? 0;
      if (left <= 0 && count) return Math.min(FIRST * STEP ** bin, this.longest);
    }
    return this.longest;
  }

  /** One sentence: the chart's text. */
  sentence() {
    if (!this.count) return "Gaps between events: none yet.";
    const [median, most] = [this.percentile(0.5), this.percentile(0.95)].map(duration);
    return `Gaps between events: median ${median}, 95 % within ${most}, longest ${duration(this.longest)}.`;
  }

  /** The latest gaps as the `d` of an SVG path, a bar each, newest at the right. */
  path() {
    const latest = this.latest.slice(-SHOWN);
    return latest
      .map((gap, n) => {
        const top = Math.max(0, HEIGHT - 0.8 - 10 * Math.log10(Math.max(gap, 1)));
        return `M${SHOWN - latest.length + n} ${HEIGHT}V${top.toFixed(1)}h.7V${HEIGHT}z`;
      })
      .join("");
  }
}

/** @param {number} ms */
export function duration(ms) {
  if (ms < 1) return "under 1 ms";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`;
}
