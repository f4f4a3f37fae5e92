import type { ChatOptions, StreamError } from "./relay-client.js";

export interface StreamingChatMessage {
  id: string;
  role: "user" | "assistant" | "system" | (string & {});
  content: string;
  /** Of an answer; none: it is whole (or a prompt). "failed": it broke off. */
  status?: "streaming" | "stopped" | "failed";
}

export interface StreamingChatOptions
  extends Omit<ChatOptions, "signal" | "onMessage" | "onText" | "onDone" | "onProgress"> {
  model?: string | undefined;
  /** What was said before; an `id` is given where there is none. */
  initialMessages?: (Omit<StreamingChatMessage, "id"> & { id?: string | undefined })[] | undefined;
}

export interface StreamingChat {
  messages: readonly StreamingChatMessage[];
  isStreaming: boolean;
  /** Why the last answer is not whole; null: it is, or it was stopped. */
  error: StreamError | null;
  /** Promises whether the answer is whole; never rejects but for a prompt that is no string. Blank: does nothing. */
  sendMessage(prompt: string, model?: string): Promise<boolean>;
  /** Ends the answer that streams; what has come stays, marked "stopped". */
  stop(): void;
  clearMessages(): void;
}

export function useStreamingChat(options?: StreamingChatOptions): StreamingChat;
