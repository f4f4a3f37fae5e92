// What the types say of correct use, and of wrong use: checked by tsc, never run.
import {
  ChatStream, EventParser, StreamError, stream, textOf,
  type End, type EventStream, type Message, type Progress,
} from "../../relay/static/relay-client.js";
import { useStreamingChat, type StreamingChatMessage } from "../../relay/static/use-streaming-chat.js";

export async function uses(): Promise<string> {
  const controller = new AbortController();
  const opened: EventStream = stream(new URL("http://127.0.0.1/"), {
    body: { prompt: "Hi" },
    headers: { "X-Mine": "1" },
    signal: controller.signal,
    endMarker: (message: Message) => message.data === "[DONE]",
    credentials: "include",
    ticket: async ({ signal }) => (await fetch("/ticket", { method: "POST", signal })).text(),
    stallTimeout: 0,
    maxReconnectAttempts: 3,
    fetch: undefined,
    onMessage: ({ event, data, id }) => console.log(event, data, id),
    onProgress: (progress: Progress) => console.log(progress.bytes + (progress.firstByteMs ?? 0)),
    onText: (text: string, whole: string) => console.log(text.length <= whole.length),
    onReconnect: ({ waitMs, error }) => console.log(waitMs, error.code),
    onError: (error: StreamError) => console.log(error.code, error.status?.toFixed(), error.retryAfter, error.cause),
    onDone: (end: End) => console.log(end.requestId),
  });
  let text = "";
  for await (const message of opened) text += textOf(message, { plain: true });
  const end: End = await opened;
  await Promise.all([opened, opened.finally(() => opened.abort())]);
  const chat = new ChatStream({ url: "/api/stream-chat", endMarker: "[DONE]" });
  await chat.stream("Hi", "m", { onText: (piece) => console.log(piece) });
  await chat.stream([{ role: "user", content: "Hi" }], null);
  const parser = new EventParser("1");
  const messages: Message[] = parser.push(new Uint8Array(1));
  console.log(messages, parser.retry ?? 0, parser.lastEventId, parser.comments, end.elapsedMs);
  return text;
}

export async function usesTheHook(): Promise<void> {
  const { messages, isStreaming, error, sendMessage, stop, clearMessages } = useStreamingChat({ model: "m" });
  const first: StreamingChatMessage | undefined = messages[0];
  const whole: boolean = await sendMessage("Hi", "m-2");
  console.log(first?.status === "failed", isStreaming && whole, error?.code);
  stop();
  clearMessages();
}

export function misuses(): void {
  // @ts-expect-error: no url
  stream();
  // @ts-expect-error: milliseconds are a number
  void stream("/", { stallTimeout: "45s" });
  // @ts-expect-error: a chat has its body from prompt and model
  void new ChatStream().stream("Hi", "m", { body: {} });
  // @ts-expect-error: a message has no text
  void stream("/", { onMessage: ({ text }) => text });
  // @ts-expect-error: a prompt is a string
  void useStreamingChat().sendMessage(1);
  // @ts-expect-error: an unknown status
  console.log(useStreamingChat().messages[0]?.status === "broken");
}
