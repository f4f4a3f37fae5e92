/** A message of an event stream. `event` is "message" where the stream names none; `id` is the last that came. */
export interface Message {
  event: string;
  data: string;
  id: string;
}

export interface Progress {
  /** Bytes of body so far, over all connections; so are the others. */
  bytes: number;
  /** Messages delivered. */
  events: number;
  /** Milliseconds from the call to the first byte of a body, a heartbeat's included; null: none yet. */
  firstByteMs: number | null;
  elapsedMs: number;
  /** The connection, counted from 1. */
  attempt: number;
  /** Comment lines. */
  heartbeats: number;
}

/** How a stream ended well. */
export interface End extends Progress {
  status: number | undefined;
  /** `X-Request-ID`; across origins only if the server exposes it. */
  requestId: string | undefined;
  lastEventId: string;
  /** All of the text; only with an `onText`. */
  text?: string;
}

/** An option that is undefined is not given. No name of the DOM's alone stands here: Node's types have all of them. */
export interface Callbacks {
  onMessage?: ((message: Message) => void) | undefined;
  /** The text in a message (see textOf) if it has any, and all of it so far. */
  onText?: ((text: string, whole: string) => void) | undefined;
  onDone?: ((end: End) => void) | undefined;
  onError?: ((error: StreamError) => void) | undefined;
  onProgress?: ((progress: Progress) => void) | undefined;
  /** Before the wait for another attempt. */
  onReconnect?: ((next: { attempt: number; waitMs: number; error: StreamError }) => void) | undefined;
}

export interface CommonOptions extends Callbacks {
  headers?: ConstructorParameters<typeof Headers>[0];
  credentials?: Request["credentials"] | undefined;
  signal?: AbortSignal | undefined;
  /**
   * The data of the message that ends the stream, or a function that knows it. None: the answer's end is the end. For
   * ChatStream it is endsChat, if none is named.
   *
   * With `"[DONE]"` or endsChat an answer that has said why it stopped is whole: by the `finish_reason` of each choice
   * that has begun, or by Anthropic's `stop_reason`. A clean end is its end then, and after 2 s without its end mark it
   * is done all the same, and the connection is closed. With a function of your own only what it says counts.
   */
  endMarker?: string | ((message: Message) => boolean) | undefined;
  /** 0 for stream(), 5 for ChatStream. */
  maxReconnectAttempts?: number | undefined;
  /** Milliseconds without a byte (heartbeats are bytes) after which the stream has stalled: 45000; 0: never. */
  stallTimeout?: number | undefined;
  /** Goes into the query as `ticket`; a function is asked for each connection. */
  ticket?: string | ((about: { signal: AbortSignal }) => string | Promise<string>) | undefined;
  /** false: error frames are messages like others. */
  errorFrames?: boolean | undefined;
  /** What onText gets; textOf unless you have another. */
  textOf?: ((message: Message) => string) | undefined;
  fetch?: typeof globalThis.fetch | undefined;
}

export interface StreamOptions extends CommonOptions {
  /**
   * With a body the request is a POST. Strings, bytes and forms are sent as they are (a string as text/plain, if
   * `headers` say nothing else), a ReadableStream is refused, anything else goes as JSON.
   */
  body?: unknown;
}

/** A promise of the end and an async iterator of the messages. */
export interface EventStream extends Promise<End> {
  abort(reason?: unknown): void;
  [Symbol.asyncIterator](): AsyncIterableIterator<Message>;
}

export function stream(url: string | URL, options?: StreamOptions): EventStream;

/** The codes that are the module's own; error frames and HTTP errors bring others. */
export type StreamErrorCode =
  /** No answer came. */
  | "network"
  /** The answer broke off, or ended without its end marker (or, in a chat, without saying why it stopped). */
  | "cut"
  /** Nothing came for `stallTimeout`. */
  | "stalled"
  /** The answer is no event stream. */
  | "not_events"
  /** The answer is a redirect, which is not followed: a key is for the host that was named. */
  | "redirect"
  /** One event, or one line, of more than 64 Mi characters. */
  | "too_large"
  | "aborted"
  /** `ticket` failed. */
  | "ticket"
  /** onMessage, onText, onProgress, onReconnect, or an endMarker or textOf of yours threw; `cause` is what. */
  | "callback"
  /** An error frame or HTTP error without a code of its own: "error", or "http_" and the status. */
  | "error"
  | `http_${number}`
  | (string & {});

export class StreamError extends Error {
  constructor(
    message: string,
    about?: { code?: string; status?: number; requestId?: string; retryAfter?: number; cause?: unknown },
  );
  code: StreamErrorCode;
  /** The HTTP status, if it is that which failed. */
  status: number | undefined;
  /** Ask support with it. */
  requestId: string | undefined;
  /** `Retry-After`, in seconds. */
  retryAfter: number | undefined;
}

export class EventParser {
  constructor(lastEventId?: string);
  lastEventId: string;
  /** Milliseconds. */
  retry: number | undefined;
  /** Comment lines so far. */
  comments: number;
  push(chunk: Uint8Array | string): Message[];
}

/** `plain`: the data of a `message` is the text whatever it looks like, as from the relay's /chat/stream. */
export function textOf(message: Pick<Message, "event" | "data">, options?: { plain?: boolean }): string;

/**
 * Whether a message is the end mark of a whole answer: OpenAI's `[DONE]`, `response.completed` or `response.incomplete`,
 * or Anthropic's `message_stop`.
 */
export function endsChat(message: Pick<Message, "event" | "data">): boolean;

export interface ChatMessage {
  role: string;
  content: unknown;
}

export interface ChatOptions extends CommonOptions {
  /** "/api/stream-chat" */
  url?: string | URL | undefined;
}

export class ChatStream {
  constructor(options?: ChatOptions);
  stream(prompt: string | ChatMessage[], model?: string | null, options?: CommonOptions): EventStream;
}
