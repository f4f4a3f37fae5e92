// What the relay says of its upstream, in words, asked again while somebody is looking.

const EVERY = 10_000; // ms; as long as the relay itself takes a probe's answer for true

/**
 * Keep an element telling the upstream's health. Its text changes only with the state: it is announced.
 *
 * @param {HTMLElement} element gets `data-state`
 * @param {HTMLElement} text gets the words
 */
export function watchHealth(element, text) {
  let timer = 0;

  async function ask() {
    clearTimeout(timer);
    const [state, words] = await look();
    element.dataset.state = state;
    if (text.textContent !== words) text.textContent = words;
    clearTimeout(timer);
    if (!document.hidden) timer = setTimeout(ask, EVERY);
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : ask()));
  ask();
}

async function look() {
  try {
    const url = new URL("./health", document.baseURI);
    const response = await fetch(url, { cache: "no-store", signal: AbortSignal.timeout(EVERY) });
    return words(await response.json());
  } catch {
    return ["down", "Relay not reachable"];
  }
}

function words(report) {
  const upstream = report?.upstream ?? {};
  switch (report?.status) {
    case "ok":
      return ["ok", upstream.demo ? "Upstream ok (the built-in demo)" : "Upstream ok"];
    case "degraded":
      if (upstream.key === "rejected") return ["degraded", "Upstream degraded: it refuses the relay’s key"];
      return ["degraded", `Upstream degraded${upstream.status_code ? `: it answers ${upstream.status_code}` : ""}`];
    case "down":
      return ["down", "Upstream down: the relay cannot reach it"];
    case "draining":
      return ["draining", "Relay draining: it is about to stop"];
    default:
      return ["unknown", "Upstream’s health unknown"];
  }
}
