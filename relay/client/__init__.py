"""Reads a chat's stream from Python: `stream_chat` gives its text the moment it arrives, and never half of it as whole.

    from relay.client import StreamError, stream_chat

    for text in stream_chat("http://127.0.0.1:8000/v1", "Hello", model="relay-demo"):
        print(text, end="", flush=True)

It works with the relay and with any API that streams as OpenAI's or Anthropic's do. It needs nothing of the service.
"""

from __future__ import annotations

from relay.client.errors import Cut, ErrorFrame, NotAnEventStream, Refused, Stalled, StreamError, Unreachable
from relay.client.stream import Event, Stream, stream_chat

__all__ = [
    "Cut",
    "ErrorFrame",
    "Event",
    "NotAnEventStream",
    "Refused",
    "Stalled",
    "Stream",
    "StreamError",
    "Unreachable",
    "stream_chat",
]
