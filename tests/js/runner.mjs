// Runs what tests/harness/js.py sends, a JSON line each, with the client at hand; answers in JSON lines, as they end.
import { createInterface } from "node:readline";

const client = await import(process.argv[2]);
const Code = (async () => {}).constructor;
const unhandled = [];
process.on("unhandledRejection", (error) => unhandled.push(error?.code ?? String(error)));

const said = ({ name, message, code, status, requestId, retryAfter }) => ({
  name, message, code, status, requestId, retryAfter,
});

createInterface({ input: process.stdin }).on("line", async (line) => {
  const { id, code, values } = JSON.parse(line);
  const answer = { id };
  try {
    const run = new Code("client", "unhandled", ...Object.keys(values), code);
    answer.value = (await run(client, unhandled, ...Object.values(values))) ?? null;
  } catch (error) {
    answer.error = said(error);
    answer.stack = error.stack;
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
});
