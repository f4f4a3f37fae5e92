"""Bodies of our own that a relay can get wrong, each with why.

Compact on purpose: together with the property test they cover the ground of `../shared`, which
not every checkout has. Pieces are sent as they are listed, each once the one before has arrived.
"""

from __future__ import annotations

from harness.cases import Case

_SSE = "text/event-stream"
_ERROR = b'event: error\ndata: {"error":{"message":"overloaded","type":"server_error"}}\n\n'

OWN: tuple[Case, ...] = (
    # Line ends
    Case("lf", (b"data: one\ndata: two\n\n",)),
    Case("cr", (b"data: one\r", b"data: two\r\r")),
    Case("crlf", (b"data: one\r\n", b"data: two\r\n\r\n")),
    Case("crlf-split", (b"data: one\r", b"\n", b"\r", b"\n")),
    Case("mixed-ends", (b"data: 1\r\ndata: 2\rdata: 3\n\r\ndata: 4\n\rdata: 5\r\n\n",)),
    Case("line-separators-of-unicode", ("data: \u2028\u2029\x85\x0b\x0c\x1c\n\n".encode(),)),
    # What fields are made of
    Case("nul", (b"data: a\0b\n\n", b"\0\0data: c\n\n", b"id: \0\n\n")),
    Case("bom", (b"\xef\xbb\xbfdata: one\n\n", b"\xef\xbb\xbfdata: two\n\n")),
    Case("bom-split", (b"\xef", b"\xbb", b"\xbf", b"data: one\n\n")),
    Case("utf-8-split", (b"data: \xd0", b"\xbf\xe2\x82", b"\xac\xf0\x9f", b"\x98", b"\x80\n\n")),
    Case("not-utf-8", (b"data: \xff\xfe\xc0\x80\xed\xa0\x80\n\n",)),
    Case("spaces", (b"data:no\n\ndata: one\n\ndata:  two\n\n data: before\n\ndata: after \n\n",)),
    Case("id-and-retry", (b"id: \xe2\x80\xa6\nretry: 2000\ndata: x\n\nid\ndata: y\n\nretry\n\n",)),
    Case("a-field-of-digits", (b"5\r\n", b"0\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n")),
    # What is around events
    Case("comments-only", (b": one\n", b":\n", b": two\n\n")),
    Case("keep-alives", (b": PROCESSING\n\n",) * 4 + (b"data: x\n\n", b"data: [DONE]\n\n")),
    Case("blank-lines", (b"\n\n\n", b"data: x\n\n\n\n", b"\n")),
    Case("empty-events", (b"data:\n\ndata\n\ndata\ndata\n\nevent: x\n\n",)),
    Case("no-final-newline", (b"data: one\n\n", b"data: [DONE]")),
    Case("no-blank-line", (b"data: one\n",)),
    Case("one-newline", (b"\n",)),
    Case("empty", ()),
    Case("after-done", (b"data: [DONE]\n\n", b"data: late\n\n", b": bye\n\n")),
    Case("error-event", (b'data: {"choices":[]}\n\n', _ERROR)),
    Case("answer-after-the-error", (_ERROR, b"data: more\n\n")),
    # Sizes
    Case("line-100k", (b"data: " + b"A" * 100_000 + b"\n\n",)),
    Case("line-10M", (b"data: ", *[b"x" * 65536] * 160, b"\n\n")),
    Case("many-events", tuple(b"data: %d\n\n" % n for n in range(1000))),
    # Not event streams
    Case("binary", (bytes(range(256)) * 8, b"\n\n", b"\0" * 4096), "application/octet-stream"),
    Case("json", (b'{"choices": [', b'{"index": 0}', b"]}\n"), "application/json"),
    Case("ndjson", (b'{"a":1}\n', b'{"a":2}\n\n'), "application/x-ndjson"),
    Case("looks-encoded", (b"\x1f\x8b\x08\0\0\0\0\0", b"\n\n\xff"), "application/gzip"),
    Case("no-type", (b"data: x\n\n",), ""),
    Case("empty-json", (), "application/json"),
    # Types and statuses
    Case("type-with-charset", (b"data: x\n\n",), "text/event-stream;charset=UTF-8"),
    Case("type-in-capitals", (b"data: x\n\n",), "Text/Event-Stream; Charset=utf-8"),
    Case("error-429", (b'{"error":{"message":"slow"}}',), "application/json", status=429),
    Case("error-500-as-events", (_ERROR,), _SSE, status=500),
    Case("created-201", (b"data: x\n\n",), _SSE, status=201),
    Case("error-529-unknown", (b"busy",), "text/plain", status=529),
    # Cut streams: every byte arrives, and then an end that nobody takes for one
    Case("cut-in-an-event", (b"data: one\n\n", b"data: tw"), end="abort"),
    Case("cut-at-an-event", (b"data: one\n\n", b"data: two\n\n"), end="abort"),
    Case("cut-at-an-event-cr", (b"data: one\r\r",), end="abort"),
    Case("cut-at-an-event-crlf", (b"data: one\r\n\r\n",), end="abort"),
    Case("cut-in-a-crlf", (b"data: one\r\n\r\n", b"data: two\r\n\r"), end="abort"),
    Case("cut-after-a-line", (b"data: one\n",), end="abort"),
    Case("cut-after-a-comment", (b": one\n",), end="abort"),
    Case("cut-after-done", (b"data: [DONE]\n\n",), end="abort"),
    Case("cut-in-a-character", (b"data: \xe2\x82",), end="abort"),
    Case("cut-before-a-byte", (), end="abort"),
    Case("cut-long", (b"data: " + b"y" * 300_000,), end="abort"),
    Case("cut-json", (b'{"choices": [',), "application/json", end="abort"),
    Case("cut-json-at-a-blank-line", (b'{"a":1}\n\n',), "application/x-ndjson", end="abort"),
    Case("cut-binary", (bytes(range(256)) * 500,), "application/octet-stream", end="abort"),
    Case("cut-error-500", (b'{"error":',), "application/json", status=500, end="abort"),
)
