"""The demo upstream, as OpenAI's SDK and plain HTTP see it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
from harness import DEADLINE

from relay.upstream import demo

ROOT = Path(__file__).parent.parent
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is\n  this?"}]


@pytest.fixture
def client():
    with openai.OpenAI(base_url=demo.start(), api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def connection():
    connection = http.client.HTTPConnection(urlsplit(demo.start()).netloc, timeout=10)
    yield connection
    connection.close()


def ask(connection, method, path, body=None):
    connection.request(method, path, body=body)
    response = connection.getresponse()
    text = response.read()
    return response, json.loads(text) if text else None


def test_one_server_a_process_however_many_ask():
    urls = []
    threads = [threading.Thread(target=lambda: urls.append(demo.start())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(urls) == 20
    assert len(set(urls)) == 1
    assert urls[0].startswith("http://127.0.0.1:")
    assert urls[0].endswith("/v1")


def test_openai_streams_words_at_a_human_pace(client):
    words = []
    finish = None
    began = time.monotonic()
    stream = client.chat.completions.create(model=demo.MODEL, messages=HELLO, stream=True)
    for chunk in stream:
        assert chunk.model == demo.MODEL
        assert chunk.usage is None
        words.append(chunk.choices[0].delta.content or "")
        finish = chunk.choices[0].finish_reason
    took = time.monotonic() - began
    assert finish == "stop"
    text = "".join(words)
    assert "demo upstream" in text
    assert "“What is this?”" in text
    assert "RELAY_UPSTREAM_URL" in text
    # 10 to 50 a second, and more time for a machine that is busy.
    assert len(words) / 50 < took < len(words) / 10 + DEADLINE


def test_openai_gets_the_usage_it_asked_for(client):
    stream = client.chat.completions.create(
        model=demo.MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 20


def test_openai_without_streaming(client):
    completion = client.chat.completions.create(model="gpt-4.1", messages=HELLO)
    assert completion.model == demo.MODEL
    assert "“What is this?”" in completion.choices[0].message.content
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.total_tokens > 20


def test_openai_lists_models(client):
    assert [model.id for model in client.models.list()] == [demo.MODEL]
    assert client.models.retrieve(demo.MODEL).id == demo.MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4.1")


def test_parts_and_long_messages(client):
    parts = [{"type": "text", "text": "x" * 500}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    completion = client.chat.completions.create(model=demo.MODEL, messages=[{"role": "user", "content": parts}])
    assert f"“{'x' * 119}…”" in completion.choices[0].message.content


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        pytest.param("GET", "/v1/nothing", None, 404, id="unknown path"),
        pytest.param("POST", "/v1/embeddings", "{}", 404, id="not offered"),
        pytest.param("GET", "/", None, 404, id="outside"),
        pytest.param("DELETE", "/v1/models/relay-demo", None, 405, id="method"),
        pytest.param("GET", "/v1/chat/completions", None, 405, id="chat by GET"),
        pytest.param("BREW", "/v1/models", None, 501, id="unknown method"),
        pytest.param("POST", "/v1/chat/completions", "{", 400, id="no JSON"),
        pytest.param("POST", "/v1/chat/completions", b"\xff", 400, id="no UTF-8"),
        pytest.param("POST", "/v1/chat/completions", "[]", 400, id="no object"),
        pytest.param("POST", "/v1/chat/completions", None, 400, id="no body"),
        pytest.param("POST", "/v1/chat/completions", "{}", 400, id="no messages"),
        pytest.param("POST", "/v1/chat/completions", '{"messages": ["x"]}', 400, id="no message"),
        pytest.param("POST", "/v1/chat/completions", '{"messages": []}', 400, id="empty messages"),
    ],
)
def test_errors_have_openais_shape(connection, method, path, body, status):
    response, answer = ask(connection, method, path, body)
    assert response.status == status
    assert response.headers["Content-Type"] == "application/json"
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["message"]


def test_a_connection_serves_many_requests(connection):
    ask(connection, "GET", "/v1/models")
    kept = connection.sock
    assert ask(connection, "POST", "/v1/nothing", "body that nobody wants")[0].status == 404
    response, answer = ask(connection, "HEAD", "/v1/models")
    assert (response.status, answer) == (200, None)
    chunks = iter([b'{"mess', b'ages": [{"role": "user", "content": "hi"}]}'])
    assert ask(connection, "POST", "/v1/chat/completions", chunks)[0].status == 200
    assert connection.sock is kept


def test_each_event_is_one_http_chunk():
    body = json.dumps({"stream": True, "messages": HELLO}).encode()
    with socket.create_connection(("127.0.0.1", urlsplit(demo.start()).port), timeout=10) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        reader = sock.makefile("rb")
        while reader.readline() != b"\r\n":
            pass
        events = []
        while size := int(reader.readline(), 16):
            events.append(reader.read(size))
            assert reader.readline() == b"\r\n"
    assert all(event.startswith(b"data: ") and event.endswith(b"\n\n") for event in events)
    assert events[-1] == b"data: [DONE]\n\n"
    first = json.loads(events[0][6:])
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
    ]


# Run in a process of its own, patched for gevent or not: clients leave in the middle, and the server's threads (or
# greenlets) are gone at once, with nothing written to stderr. Its words take a minute, so that none ends by itself.
LEAVE = """
import sys
if sys.argv[1] == "gevent":
    from gevent import monkey
    monkey.patch_all()
import json, socket, threading, time
from urllib.parse import urlsplit
from relay.upstream import demo

demo._PAUSE = 1.5
body = json.dumps({"stream": True, "messages": [{"role": "user", "content": "hi"}]}).encode()
port = urlsplit(demo.start()).port
before = threading.active_count()
clients = []
for _ in range(50):
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = "POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body)
    sock.sendall(head.encode() + body)
    clients.append(sock)
for sock in clients:
    assert sock.recv(4096)
assert threading.active_count() == before + 50, threading.active_count()
for sock in clients:
    sock.close()
left = time.monotonic()
while threading.active_count() > before and time.monotonic() < left + 20:
    time.sleep(0.005)
print(threading.active_count() - before, time.monotonic() - left)
"""


@pytest.mark.parametrize("kind", ["threads", "gevent"])
def test_it_stops_when_the_client_leaves(kind):
    done = subprocess.run(
        [sys.executable, "-c", LEAVE, kind],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    left, seconds = done.stdout.split()
    assert left == "0"
    assert float(seconds) < DEADLINE
