/*
 * A chat for React 18 and newer: useStreamingChat(options). An ES module that imports "react" by that name (a bundler
 * or an import map finds it) and relay-client.js beside it. It renders nothing.
 *
 *   const { messages, isStreaming, error, sendMessage, stop, clearMessages } = useStreamingChat({ model: "gpt-4.1" });
 *
 * What it holds to:
 * - `messages` are {id, role, content, status?}. An answer's status is "streaming", then none when it is whole,
 *   "stopped" when it was stopped, "failed" when it broke off: what has come stays to be seen, and is not whole.
 * - sendMessage() sends the conversation with each prompt. Turns that failed, or were stopped before a word came, are
 *   left out with their prompt: roles alternate, and a prompt that the model refuses is not sent again and again. What
 *   was stopped later is sent as far as it came.
 * - A message sent while an answer streams stops that answer first. So does clearMessages(), and so does unmounting,
 *   after which nothing is sent.
 * - Text that arrives in a burst renders once a frame; the end renders at once, with the last of it.
 * - sendMessage() never rejects (but for a prompt that is no string): it promises whether the answer is whole, and
 *   `error` says why it is not.
 *
 * Each component has its own conversation, kept outside of React's state (useSyncExternalStore), so that no render can
 * lose a change. Under StrictMode effects run twice: the first clean-up finds nothing to stop.
 */

import { useEffect, useState, useSyncExternalStore } from "react";
import { ChatStream } from "./relay-client.js";

const HIDDEN_FRAME = 200; // ms; a page that is not seen has no animation frames

let ids = 0;
const newId = () => `chat-${(ids += 1)}`;

class Conversation {
  #options;
  #listeners = new Set();
  #snapshot;
  #current = null; // the answer that streams: {stream, id, text, cancelFrame}
  #unmounted = false;

  constructor(options) {
    this.#options = options;
    this.#snapshot = { messages: options.initialMessages?.map(withId) ?? [], isStreaming: false, error: null };
  }

  setOptions = (options) => {
    this.#options = options;
  };

  mount = () => {
    this.#unmounted = false; // StrictMode mounts again what it has unmounted
    return () => {
      this.#unmounted = true;
      this.stop();
    };
  };

  subscribe = (listener) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  getSnapshot = () => this.#snapshot;

  sendMessage = async (prompt, model) => {
    if (typeof prompt !== "string") throw new TypeError("sendMessage(prompt, model?): the prompt must be a string");
    if (prompt.trim() === "" || this.#unmounted) return false;
    this.stop();
    const { initialMessages, model: usual, onError, ...options } = this.#options;
    const question = { id: newId(), role: "user", content: prompt };
    const answer = { id: newId(), role: "assistant", content: "", status: "streaming" };
    const said = [...history(this.#snapshot.messages), { role: "user", content: prompt }];
    const current = { id: answer.id, text: "", stream: null, cancelFrame: null };
    this.#current = current;
    this.#set({ messages: [...this.#snapshot.messages, question, answer], isStreaming: true, error: null });
    try {
      current.stream = new ChatStream(options).stream(said, model ?? usual, {
        onText: (_, whole) => {
          current.text = whole;
          if (this.#current === current) current.cancelFrame ??= nextFrame(() => this.#show(current));
        },
      });
      await current.stream;
      this.#end(current, undefined, null);
      return true;
    } catch (error) {
      if (this.#current === current) {
        this.#end(current, "failed", error);
        onError?.(error);
      }
      return false;
    }
  };

  /** Ends the answer that streams, if one does; what has come of it stays. */
  stop = () => {
    const current = this.#current;
    if (current === null) return;
    this.#end(current, "stopped", null);
    current.stream?.abort();
  };

  clearMessages = () => {
    this.stop();
    this.#set({ messages: [], isStreaming: false, error: null });
  };

  #show(current) {
    current.cancelFrame = null;
    this.#set({ messages: this.#with(current, "streaming") });
  }

  #end(current, status, error) {
    if (this.#current !== current) return;
    this.#current = null;
    current.cancelFrame?.();
    this.#set({ messages: this.#with(current, status), isStreaming: false, error });
  }

  #with({ id, text }, status) {
    const answer = { id, role: "assistant", content: text };
    if (status !== undefined) answer.status = status;
    return this.#snapshot.messages.map((message) => (message.id === id ? answer : message));
  }

  #set(change) {
    this.#snapshot = { ...this.#snapshot, ...change };
    for (const listener of this.#listeners) listener();
  }
}

const withId = (message) => ({ ...message, id: message.id ?? newId() });

/** What the model is told of a conversation: whole turns, and stopped ones as far as they came. */
function history(messages) {
  const told = [];
  for (const { role, content, status } of messages) {
    const lost = role === "assistant" && (status === "failed" || content === "");
    if (!lost) told.push({ role, content });
    else if (told.at(-1)?.role === "user") told.pop();
  }
  return told;
}

/** Calls back with the next frame; gives what calls it off. */
function nextFrame(callback) {
  if (typeof requestAnimationFrame !== "function" || document.hidden) {
    const timer = setTimeout(callback, HIDDEN_FRAME);
    return () => clearTimeout(timer);
  }
  const frame = requestAnimationFrame(callback);
  return () => cancelAnimationFrame(frame);
}

/** Options: those of ChatStream, `model`, and `initialMessages`; the newest are those of the next message. */
export function useStreamingChat(options = {}) {
  const [chat] = useState(() => new Conversation(options));
  useEffect(() => chat.setOptions(options));
  useEffect(chat.mount, [chat]);
  const { messages, isStreaming, error } = useSyncExternalStore(chat.subscribe, chat.getSnapshot, chat.getSnapshot);
  const { sendMessage, stop, clearMessages } = chat;
  return { messages, isStreaming, error, sendMessage, stop, clearMessages };
}
