"""What a request has read and opened is freed when it is answered, however it is answered.

In the service the collector comes round rarely, for it stops all streams; garbage that waits for it holds the request's
body, its sockets and its stream. So here it is off, in a real gunicorn that says what is alive in its worker.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import pytest
from harness import DeadlineExceeded, eventually, servers
from harness.client import Connection, NoResponse
from harness.servers import free_port
from harness.upstream import Exchange, Upstream, deaf

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EVENTS = [("Content-Type", "text/event-stream")]
CLOSE = [("Connection", "close")]
MOST = 1000  # bytes of a request's body
TIMES = 3

_APP = """
import gc, json, os
from collections import Counter
import gunicorn.http.message
from flask import Flask, Request
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from relay import Relay, errors, record, textview, worker
from relay.stream import relayed as stream, waiting
from relay.upstream import exchange
from relay.service.app import create_app

KINDS = (
    stream.Stream, textview.TextView, exchange.Exchange, record.Record, errors.RelayError, waiting.Task,
    gunicorn.http.message.Request, Request, worker._Client,
)

def alive(environ, start_response):
    found = Counter(type(each).__name__ for each in gc.get_objects() if issubclass(type(each), KINDS))
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(found).encode()]

shop = Flask("shop")
for name, settings in json.loads(os.environ["SHOP"]).items():
    Relay(shop, name=name, url_prefix=f"/{name}", settings=settings)
app = DispatcherMiddleware(create_app(), {"/alive": alive, "/shop": shop})
gc.disable()
"""


class Place(NamedTuple):
    """A service with one worker, and beside it a shop whose relays have each an upstream that is not there."""

    upstream: Upstream
    port: int

    def alive(self) -> dict[str, int]:
        """How many objects of a request's there are in the worker, by type. This request's own count, too."""
        with Connection(self.port) as connection:
            found: dict[str, int] = json.loads(connection.request("GET", "/alive", CLOSE).finish().data)
            return found

    def ask(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes = b"") -> int:
        """The status of the answer, once all of it is there and the connection closed."""
        with Connection(self.port) as connection:
            response = connection.request(method, path, [*headers, *CLOSE], body)
            response.finish()
            return response.status

    def get(self, path: str) -> int:
        return self.ask("GET", path, [("Accept", "text/event-stream")])

    def raw(self, head: str, body: bytes = b"") -> int:
        """A POST with these further header lines and these bytes after them, which end there; 0: no answer."""
        with Connection(self.port) as connection:
            connection.raw(f"POST /v1/x HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n{head}\r\n\r\n".encode() + body)
            connection.half_close()
            try:
                return connection.read_head().status
            except NoResponse:
                return 0

    def leave(self, path: str, *, after: bytes = b"") -> None:
        """Ask, and leave once these bytes have come."""
        with Connection(self.port) as connection:
            connection.send("GET", path, [("Accept", "text/event-stream")])
            if after:
                connection.read_head().read_until(after)
            else:
                eventually(lambda: self.alive().get("_GreenletTask", 0) > 0, "the relay connects")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder: Path = tmp_path_factory.mktemp("freed")
    (folder / "freed.py").write_text(_APP)
    with Upstream() as upstream, deaf() as nobody:
        shop = {
            "refused": {"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{free_port()}"},
            "refused_tls": {"RELAY_UPSTREAM_URL": f"https://127.0.0.1:{free_port()}"},
            "no_tls": {"RELAY_UPSTREAM_URL": f"https://127.0.0.1:{upstream.port}", "RELAY_CONNECT_TIMEOUT": "0.2"},
            "no_proxy": {
                "RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_UPSTREAM_PROXY": f"http://127.0.0.1:{free_port()}"
            },
            "unknown": {"RELAY_UPSTREAM_URL": "http://nobody.invalid"},  # RFC 6761: never resolves
            "deaf": {"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{nobody}"},
            "deaf_soon": {"RELAY_UPSTREAM_URL": f"http://127.0.0.1:{nobody}", "RELAY_CONNECT_TIMEOUT": "0.2"},
            "limited": {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_RATE_LIMIT": "1/day"},
        }  # fmt: skip
        env = {
            "RELAY_UPSTREAM_URL": upstream.base_url,
            "RELAY_MAX_BODY": str(MOST),
            "RELAY_FIRST_BYTE_TIMEOUT": "0.2",
            "RELAY_IDLE_TIMEOUT": "0.2",
            "RELAY_HOLD": "0",
            "SHOP": json.dumps(shop),
            "PYTHONPATH": str(folder),
        }
        with servers.gunicorn(env, app="freed:app") as relay:
            yield Place(upstream, relay.port)


def ends(*pieces: bytes, how: str = "end") -> Callable[[Exchange], None]:
    """An upstream's event stream of these pieces, and how it ends."""

    def handler(ex: Exchange) -> None:
        ex.head(headers=EVENTS)
        for piece in pieces:
            ex.send(piece)
        if how == "broken":
            ex.raw(b"no chunk\r\n")
        ex.end() if how == "end" else ex.abort() if how == "abort" else ex.wait_gone()

    return handler


def says(data: bytes) -> Callable[[Exchange], None]:
    """An upstream that answers so, and hangs up."""

    def handler(ex: Exchange) -> None:
        ex.raw(data)
        ex.abort()

    return handler


CHUNKED = "Transfer-Encoding: chunked"
MUCH = b"%x\r\n%b\r\n0\r\n\r\n" % (4 * MOST, b"x" * 4 * MOST)

CASES = [
    pytest.param(ends(b"data: 1\n\n"), lambda at, path: at.get(path) == 200, id="done"),
    pytest.param(ends(b"data: 1\n\n", how="abort"), lambda at, path: at.get(path) == 200, id="cut"),
    pytest.param(ends(b"data: 1\n\n", how="broken"), lambda at, path: at.get(path) == 200, id="no chunk"),
    pytest.param(ends(b"data: 1\n\n", how="silent"), lambda at, path: at.get(path) == 200, id="idle"),
    pytest.param(ends(how="broken"), lambda at, path: at.get(path) == 200, id="no chunk at all"),
    pytest.param(says(b""), lambda at, path: at.get(path) == 502, id="hung up"),
    pytest.param(says(b"220 mail.example ESMTP\r\n\r\n"), lambda at, path: at.get(path) == 502, id="no HTTP"),
    pytest.param(lambda ex: ex.wait_gone(), lambda at, path: at.get(path) == 504, id="no first byte"),
    pytest.param(
        ends(b"data: 1\n\n", how="silent"), lambda at, path: at.leave(path, after=b"1\n\n") is None, id="client gone"
    ),
    pytest.param(ends(), lambda at, path: at.ask("POST", path, [], b"x" * (MOST + 1)) == 413, id="too long"),
    pytest.param(None, lambda at, _: at.raw(CHUNKED, MUCH) == 413, id="too long, in chunks"),
    pytest.param(None, lambda at, _: at.raw("Content-Length: 100", b"x" * 99) == 400, id="body cut short"),
    pytest.param(None, lambda at, _: at.raw(CHUNKED, b"64\r\nxxx") == 400, id="chunk cut short"),
    pytest.param(None, lambda at, _: at.raw(CHUNKED, b"no chunk\r\n\r\n") == 400, id="a body of no chunks"),
    pytest.param(None, lambda at, _: at.raw(f"Origin: https://a.example\r\n{CHUNKED}", MUCH) == 403, id="stranger"),
    pytest.param(None, lambda at, _: at.raw("No header: x") == 400, id="no request"),
    pytest.param(None, lambda at, _: at.get("/nothing/here") == 404, id="no such path"),
    pytest.param(None, lambda at, _: at.ask("POST", "/health", []) == 405, id="no such method"),
    pytest.param(None, lambda at, _: at.ask("POST", "/chat/stream", [], b"{") == 400, id="no prompt"),
    pytest.param(ends(), lambda at, _: at.get("/shop/limited/models") in (200, 429), id="too many"),
    pytest.param(None, lambda at, _: at.get("/shop/refused/x") == 502, id="upstream refuses"),
    pytest.param(None, lambda at, _: at.get("/shop/refused_tls/x") == 502, id="upstream refuses TLS"),
    pytest.param(None, lambda at, _: at.get("/shop/no_tls/x") == 504, id="TLS that is not answered"),
    pytest.param(None, lambda at, _: at.get("/shop/no_proxy/x") == 502, id="proxy refuses"),
    pytest.param(None, lambda at, _: at.get("/shop/unknown/x") == 502, id="no such host"),
    pytest.param(None, lambda at, _: at.get("/shop/deaf_soon/x") == 504, id="upstream is deaf"),
    pytest.param(None, lambda at, _: at.leave("/shop/deaf/x") is None, id="client gone, upstream is deaf"),
]


@pytest.mark.parametrize(("handler", "asked"), CASES)
def test_it_is_freed_without_the_garbage_collector(
    place: Place, handler: Callable[[Exchange], None] | None, asked: Callable[[Place, str], bool]
) -> None:
    path = "/v1" + place.upstream.serve(handler) if handler is not None else ""
    # Once before: what is made at the first such request may stay.
    assert asked(place, path)
    before = _calm(place)
    for _ in range(TIMES):
        assert asked(place, path)
    try:
        eventually(lambda: place.alive() == before, "freed", every=0.05)
    except DeadlineExceeded:
        assert place.alive() == before


def _calm(place: Place) -> dict[str, int]:
    """What is alive when that stands still."""
    last: dict[str, int] = {}

    def still() -> bool:
        now = place.alive()
        same = now == last
        last.clear()
        last.update(now)
        return same

    eventually(still, "as many objects as before", every=0.2)
    return last
