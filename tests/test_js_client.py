"""relay-client.js does what its header says, in Node and in Chromium alike, through a relay."""

from __future__ import annotations

import contextlib
import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from harness import eventually, llm, servers
from harness.js import Job, Place, Tab, Thrown, node, pages, run
from harness.upstream import PeerGone, Upstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.servers import Gunicorn
    from harness.upstream import Exchange
    from playwright.sync_api import Browser

EVENTS = [("Content-Type", "text/event-stream")]
JSON = [("Content-Type", "application/json")]
DONE = b"data: [DONE]\n\n"


@dataclass
class Shop:
    """A shop with a relay at /v1, the upstream behind it, and a place where the client runs."""

    upstream: Upstream
    server: Gunicorn
    place: Place
    is_page: bool

    def url(self, path: str) -> str:
        return f"{self.server.base_url}/v1{path}"

    def start(self, code: str, path: str = "/", **values: Any):
        return self.place.start(code, url=self.url(path), **values)

    def run(self, code: str, path: str = "/", **values: Any) -> Any:
        return self.start(code, path, **values).result()

    def code(self, code: str, path: str = "/", **values: Any) -> str | None:
        """The code of the error that it throws."""
        return self.error(code, path, **values)["code"]

    def error(self, code: str, path: str = "/", **values: Any) -> dict[str, Any]:
        with pytest.raises(Thrown) as caught:
            self.run(code, path, **values)
        return caught.value.error


@pytest.fixture(scope="module")
def relayed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Upstream, Gunicorn]]:
    with Upstream() as upstream, pages(upstream, tmp_path_factory.mktemp("built")) as server:
        yield upstream, server


@pytest.fixture(scope="module")
def in_node(relayed: tuple[Upstream, Gunicorn]) -> Iterator[Shop]:
    with node() as place:
        yield Shop(*relayed, place, is_page=False)


@pytest.fixture(scope="module")
def in_page(relayed: tuple[Upstream, Gunicorn], browser: Browser) -> Iterator[Shop]:
    context = browser.new_context()
    page = context.new_page()
    page.goto(relayed[1].base_url)
    yield Shop(*relayed, Tab(page), is_page=True)
    context.close()


@pytest.fixture(params=["node", "page"])
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    found: Shop = request.getfixturevalue(f"in_{request.param}")
    run(found.place, "unhandled.length = 0")
    yield found
    found.upstream.check()


def answers(*pieces: bytes, end: str = "clean", headers: Any = EVENTS):
    """A handler that sends these and ends so."""

    def handler(ex: Exchange) -> None:
        ex.head(headers=headers)
        for piece in pieces:
            ex.send(piece)
        ex.end() if end == "clean" else ex.abort()

    return handler


def cut_once_read(upstream: Upstream, *pieces: bytes) -> tuple[Any, str]:
    """A handler that cuts its answer once the client has GET the path that comes with it.

    Chromium's fetch loses what it has received and the page has not read when the connection breaks.
    """
    was_read = threading.Event()

    def read(ex: Exchange) -> None:
        was_read.set()
        ex.reply()

    def handler(ex: Exchange) -> None:
        ex.head(headers=EVENTS)
        for piece in pieces:
            ex.send(piece)
        ex.wait(was_read)
        ex.abort()

    return handler, upstream.serve(read)


def in_turn(*handlers: Any):
    """Answers the first request with the first, and so on; the last stays."""
    left = list(handlers)
    lock = threading.Lock()

    def handler(ex: Exchange) -> None:
        with lock:
            mine = left.pop(0) if len(left) > 1 else left[0]
        mine(ex)

    return handler


# The client's clock, which stands still until the test has it go on by `clock.pass(ms)`: however long a busy machine
# takes, nothing has stalled until the test says so. Timers run as ever, and look at this clock; the time for which a
# page that has slept is waited for, a second, is ten.
_CLOCK = """
globalThis.clock = {
    now: performance.now(), timer: setTimeout, later: setTimeout.bind(globalThis),
    pass(ms) { clock.now += ms; },
    restore() { delete performance.now; globalThis.setTimeout = clock.timer; },
};
Object.defineProperty(performance, "now", {value: () => clock.now, configurable: true});
globalThis.setTimeout = (call, ms, ...more) => clock.later(call, ms === 1000 ? 10_000 : ms, ...more);
"""


@pytest.fixture
def clock(shop: Shop) -> Iterator[Callable[[int], None]]:
    """Has the client's clock go on by so many milliseconds."""
    run(shop.place, _CLOCK)
    yield lambda ms: run(shop.place, "clock.pass(ms)", ms=ms)
    run(shop.place, "clock.restore()")


# --- What it sends and gives


def test_messages_come_one_by_one_while_the_stream_is_open(shop: Shop) -> None:
    path = shop.upstream.by_hand()
    job = shop.start(
        """
        globalThis.kept = [];
        for await (const message of client.stream(url)) kept.push(message);
        return kept;
        """,
        path,
    )
    ex = shop.upstream.next(path)
    assert (ex.method, ex.header("Accept")) == (b"GET", b"text/event-stream")
    ex.head(headers=EVENTS)
    for n in range(3):
        ex.send(b"id: %d\ndata: piece\n\n" % n)
        eventually(lambda n=n: run(shop.place, "return kept.length") == n + 1, "the message")
    ex.send(b"event: named\ndata: a\ndata: b\n\ndata: unfinished")
    ex.end()
    assert job.result() == [
        *({"event": "message", "data": "piece", "id": str(n)} for n in range(3)),
        {"event": "named", "data": "a\nb", "id": "2"},
    ]


def test_its_promise_is_of_the_end_and_the_callbacks_are_called_on_the_way(shop: Shop) -> None:
    path = shop.upstream.serve(answers(b": beat\n\ndata: a\n\n", b"data: b\n\n"))
    end, calls = shop.run(
        """
        const calls = [];
        const end = await client.stream(url, {
            onMessage: ({data}) => calls.push(data),
            onProgress: (progress) => calls.push(progress),
            onDone: (end) => calls.push("done", end),
            onError: (error) => calls.push(error.code),
        });
        return [end, calls];
        """,
        path,
    )
    assert [call for call in calls if isinstance(call, str)] == ["a", "b", "done"]
    assert calls[-1] == end
    progress = calls[-3]
    body = b": beat\n\ndata: a\n\ndata: b\n\n"
    assert {**end, "bytes": len(body), "events": 2, "heartbeats": 1, "attempt": 1, "status": 200} == end
    assert (progress["bytes"], progress["events"], progress["heartbeats"]) == (len(body), 2, 1)
    assert 0 < progress["firstByteMs"] <= progress["elapsedMs"] <= end["elapsedMs"]
    assert end["requestId"] == shop.upstream.seen(path)[0].header("X-Request-ID").decode()


def test_an_object_is_posted_as_json_and_a_string_as_it_is(shop: Shop) -> None:
    path = shop.upstream.serve(answers(DONE))
    shop.run(
        """
        await client.stream(url, {body: {prompt: "čau 🐘"}, headers: {"X-Mine": "1"}});
        await client.stream(url, {body: '{"as": "it is"}', headers: {"Content-Type": "application/x-mine"}});
        await client.stream(url, {body: [1], headers: new Headers({"Content-Type": "application/x-list"})});
        """,
        path,
    )
    first, second, third = shop.upstream.seen(path)
    assert {ex.method for ex in (first, second, third)} == {b"POST"}
    assert json.loads(first.body) == {"prompt": "čau 🐘"}
    assert (first.header("Content-Type"), first.header("X-Mine")) == (b"application/json", b"1")
    assert (second.header("Content-Type"), second.body) == (b"application/x-mine", b'{"as": "it is"}')
    assert (third.header("Content-Type"), third.body) == (b"application/x-list", b"[1]")


def test_credentials_and_the_signal_are_fetchs(shop: Shop) -> None:
    path = shop.upstream.serve(answers(DONE))
    assert shop.run(
        """
        let seen;
        const spy = (url, init) => { seen = init; return fetch(url, init); };
        await client.stream(url, {credentials: "include", fetch: spy});
        return [seen.credentials, seen.cache, seen.signal instanceof AbortSignal];
        """,
        path,
    ) == ["include", "no-store", True]


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("http://[", "{}"),
        ("/x", "{headers: {'b ad': '1'}}"),
        ("/x", "{body: 1n}"),
        ("http://127.0.0.1/", "{body: new Blob(['x']).stream()}"),
    ],
    ids=["url", "header", "body", "read-once-body"],
)
def test_what_cannot_be_sent_is_said_at_once(shop: Shop, url: str, options: str) -> None:
    said = shop.run(f"try {{ client.stream({url!r}, {options}) }} catch (error) {{ return error.name }}")
    assert said == "TypeError"


def test_a_message_waits_for_a_slow_iterator_and_for_a_late_one(shop: Shop) -> None:
    count = 3000
    path = shop.upstream.serve(answers(*(b"data: %d\n\n" % n for n in range(count))))
    slow, late = shop.run(
        """
        const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
        const slow = [], late = [];
        for await (const {data} of client.stream(url)) {
            slow.push(Number(data));
            if (slow.length % 500 === 0) await wait(10);
        }
        const second = client.stream(url);
        await second;
        for await (const {data} of second) late.push(Number(data));
        return [slow, late];
        """,
        path,
    )
    assert slow == late == list(range(count))


def test_an_iterator_that_stands_still_stops_the_upstream_and_then_gets_all(
    shop: Shop, clock: Callable[[int], None]
) -> None:
    """And that nothing is read meanwhile is no stall."""
    event = b"data: " + b"x" * 99_993 + b"\n\n"
    count = 400  # 40 MB: more than the queue and all of the kernels' buffers on the way

    def handler(ex: Exchange) -> None:
        ex.head(headers=EVENTS)
        for _ in range(count):
            ex.send(event)
        ex.end()

    path = shop.upstream.serve(handler)
    job = shop.start(
        """
        globalThis.go = undefined;
        const blocked = new Promise((resolve) => { globalThis.go = resolve; });
        let bytes = 0, events = 0;
        for await (const {data} of client.stream(url, {stallTimeout: 300})) {
            if (events === 0) await blocked;
            events += 1;
            bytes += data.length;
        }
        return [events, bytes];
        """,
        path,
    )
    ex = shop.upstream.next(path)
    before = -1

    def stands_still() -> bool:
        nonlocal before
        before, last = ex.written, before
        return 0 < before == last

    eventually(stands_still, "the upstream is not read any more", every=0.7)
    assert ex.written < len(event) * count
    clock(900)
    run(shop.place, "await new Promise((resolve) => setTimeout(resolve, 700))")  # the client has looked at it
    run(shop.place, "go()")
    assert job.result() == [count, count * 99_993]


def test_messages_that_nobody_reads_are_not_kept_and_who_comes_late_is_told(shop: Shop) -> None:
    event = b"data: " + b"x" * 99_993 + b"\n\n"
    path = shop.upstream.serve(answers(*[event] * 100))
    found = shop.run(
        """
        const opened = client.stream(url);
        const {events, bytes} = await opened;
        try {
            for await (const {data} of opened) return data;
        } catch (error) {
            return [events, bytes, error.name];
        }
        """,
        path,
    )
    assert found == [100, 100 * len(event), "TypeError"]


# --- Ends


def test_a_clean_end_is_the_end_where_no_marker_is_asked_for(shop: Shop) -> None:
    path = shop.upstream.serve(answers(b"data: a\n\n"))
    assert shop.run("return (await client.stream(url, {maxReconnectAttempts: 3})).events", path) == 1
    assert len(shop.upstream.seen(path)) == 1


def test_an_end_without_its_marker_is_a_cut_after_all_that_came(shop: Shop) -> None:
    path = shop.upstream.serve(answers(b"data: a\n\n", b"data: b\n\n"))
    kept = shop.run(
        """
        const kept = [];
        try {
            for await (const {data} of client.stream(url, {endMarker: "[DONE]", body: {}})) kept.push(data);
        } catch (error) { kept.push(error.code, error instanceof client.StreamError); }
        return kept;
        """,
        path,
    )
    assert kept == ["a", "b", "cut", True]


@pytest.mark.parametrize("marker", ['"[DONE]"', '(message) => message.data === "[DONE]"'], ids=["text", "function"])
def test_after_the_end_marker_nothing_counts_and_the_connection_is_closed(shop: Shop, marker: str) -> None:
    path = shop.upstream.by_hand()
    job = shop.start(
        f"""
        const kept = [];
        await client.stream(url, {{endMarker: {marker}, onMessage: ({{data}}) => kept.push(data)}});
        return kept;
        """,
        path,
    )
    ex = shop.upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(b"data: a\n\n" + DONE + b"data: late\n\n")
    assert job.result() == ["a", "[DONE]"]
    ex.wait_gone()


def said(text: str = "Hi", finish: str | None = None, index: int = 0) -> bytes:
    """A chunk of OpenAI's chat."""
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish}
    return llm.event(llm.as_json({"choices": [choice]}))


ANTHROPIC = (
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"Hi"}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"}}\n\n'
)


@pytest.mark.parametrize(
    ("whole", "marker"),
    [
        pytest.param(said(finish="stop"), '"[DONE]"', id="openai"),
        pytest.param(ANTHROPIC, "client.endsChat", id="anthropic"),
    ],
)
def test_a_clean_end_is_the_end_of_an_answer_that_has_said_why_it_stopped(
    shop: Shop, whole: bytes, marker: str
) -> None:
    path = shop.upstream.serve(answers(whole))
    code = f"return client.stream(url, {{endMarker: {marker}, body: {{}}, onText: () => 0}})"
    assert shop.run(code, path)["text"] == "Hi"


def test_an_answer_that_has_said_why_it_stopped_is_whole_without_its_mark(shop: Shop) -> None:
    """After two seconds, in which another that has not said it, or not for all of its choices, only goes on."""

    def opened(marker: str, *pieces: bytes) -> tuple[Job, Exchange]:
        path = shop.upstream.by_hand()
        code = f"return client.stream(url, {{endMarker: {marker}, body: {{}}, stallTimeout: 0, onText: () => 0}})"
        job = shop.start(code, path)
        ex = shop.upstream.next(path)
        ex.head(headers=EVENTS)
        for each in pieces:
            ex.send(each)
        return job, ex

    two_choices = opened("client.endsChat", said(), said("Ho", index=1), said("", "stop"))
    own_marker = opened('({data}) => data === "[DONE]"', said(finish="stop"))
    openai = opened('"[DONE]"', said(finish="stop"))
    anthropic = opened("client.endsChat", ANTHROPIC)
    pings = opened("client.endsChat", said(finish="stop"))
    with contextlib.suppress(PeerGone):
        while not pings[1].gone:
            pings[1].send(b": ping\n\n")
            pings[1].finished.wait(0.1)
    for job, ex in (openai, anthropic, pings):
        assert job.result()["text"] == "Hi"
        ex.wait_gone()
    for job, ex in (two_choices, own_marker):
        assert not ex.gone
        ex.send(said("", "stop", index=1) + DONE)
        ex.end()
        assert job.result()["text"] == "Hi"


def test_its_usage_and_its_end_mark_have_time_to_come(shop: Shop) -> None:
    path = shop.upstream.by_hand()
    code = """
    globalThis.kept = [];
    for await (const {data} of client.stream(url, {body: {}, endMarker: "[DONE]"})) kept.push(data);
    return kept;
    """
    job = shop.start(code, path)
    ex = shop.upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(said(finish="stop"))
    eventually(lambda: run(shop.place, "return kept.length") == 1, "the reason")
    ex.send(b'data: {"choices":[],"usage":{}}\n\n')
    ex.send(DONE)
    assert job.result()[1:] == ['{"choices":[],"usage":{}}', "[DONE]"]


@pytest.mark.parametrize(
    ("marker", "pieces"),
    [
        pytest.param("client.endsChat", said(), id="no reason yet"),
        pytest.param("client.endsChat", said(finish="stop") + said("Ho", index=1), id="another choice goes on"),
        pytest.param('(m) => m.data === "[DONE]"', said(finish="stop"), id="a function of one's own"),
        pytest.param('"end"', said(finish="stop"), id="another marker"),
    ],
)
def test_an_answer_that_has_not_said_it_is_a_cut(shop: Shop, marker: str, pieces: bytes) -> None:
    path = shop.upstream.serve(answers(pieces))
    code = f"return client.stream(url, {{body: {{}}, endMarker: {marker}}}).then(() => null, (error) => error.code)"
    assert shop.run(code, path) == "cut"


@pytest.mark.parametrize("piece", [b"data: tw", b"data: two\n"], ids=["in-a-line", "after-a-line"])
@pytest.mark.parametrize("body", ["undefined", "{}"], ids=["GET", "POST"])
def test_a_stream_that_breaks_off_is_a_cut_marker_or_not(shop: Shop, piece: bytes, body: str) -> None:
    handler, read = cut_once_read(shop.upstream, b"data: one\n\n", piece)
    path = shop.upstream.serve(handler)
    error, kept = shop.run(
        f"""
        const kept = [];
        const onMessage = ({{data}}) => {{ kept.push(data); fetch(read); }};
        const error = await client.stream(url, {{body: {body}, onMessage}}).catch(
            (error) => [error.code, error.cause instanceof Error, error.requestId]);
        return [error, kept];
        """,
        path,
        read=shop.url(read),
    )
    (ex,) = shop.upstream.seen(path)
    assert error == ["cut", True, ex.header("X-Request-ID").decode()]
    assert kept == ["one"]


@pytest.mark.parametrize(
    ("frame", "code", "message"),
    [
        pytest.param(b'event: error\ndata: {"error":{"message":"M","code":"C","type":"T"}}', "C", "M", id="relay"),
        pytest.param(
            b'event: error\ndata: {"type":"error","error":{"type":"T","message":"M"}}', "T", "M", id="anthropic"
        ),
        pytest.param(b'data: {"error":{"message":"M","type":"T","code":null}}', "T", "M", id="openai"),
        pytest.param(b'data: {"choices":[],"error":{"message":"M","code":502}}', "502", "M", id="openrouter"),
        pytest.param(b'event: error\ndata: {"type":"error","code":"C","message":"M"}', "C", "M", id="responses"),
        pytest.param(b'data: {"error":"M"}', "error", "M", id="a-text"),
        pytest.param(
            b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"code":"C","message":"M"}}}',
            "C",
            "M",
            id="responses-failed",
        ),
        pytest.param(b"event: error\ndata: M", "error", "M", id="no-json"),
        pytest.param(b"event: error\ndata:", "error", "The stream reports an error", id="nothing"),
    ],
)
def test_an_error_frame_is_raised_and_what_follows_is_not_read(
    shop: Shop, frame: bytes, code: str, message: str
) -> None:
    path = shop.upstream.serve(answers(b"data: one\n\n" + frame + b"\n\ndata: more\n\n" + DONE))
    error, kept = shop.run(
        """
        const kept = [];
        const options = {endMarker: "[DONE]", body: {}, onMessage: ({data}) => kept.push(data)};
        return [await client.stream(url, options).catch((error) => [error.code, error.message]), kept];
        """,
        path,
    )
    assert (error, kept) == ([code, message], ["one"])
    assert shop.run("return (await client.stream(url, {errorFrames: false})).events", path) == 4


@pytest.mark.parametrize("data", [b'{"error":null,"choices":[]}', b'{"x":{"error":{}}}', b'say "error"'])
def test_what_only_speaks_of_errors_is_a_message(shop: Shop, data: bytes) -> None:
    path = shop.upstream.serve(answers(b"data: " + data + b"\n\n"))
    assert shop.run("return (await client.stream(url)).events", path) == 1


def test_the_relays_own_error_frame_says_why_a_stream_was_cut(shop: Shop) -> None:
    path = shop.upstream.serve(answers(b"data: one\n\n", end="abort"))
    told: list[str] = []

    def tells() -> bool:
        error = shop.error("await client.stream(url, {body: {}})", path)
        assert error["requestId"] == shop.upstream.seen(path)[-1].header("X-Request-ID").decode()
        told.append(error["code"])
        return told[-1] == "upstream_cut"

    # A page that is kept busy for a quarter of a second loses the frame with the connection: that is a cut, too.
    eventually(tells, "the relay's own error")
    assert set(told) <= {"cut", "upstream_cut"}


def test_an_http_error_has_the_bodys_message_and_code(shop: Shop) -> None:
    def handler(ex: Exchange) -> None:
        body = b'{"error":{"message":"slow down","type":"requests","code":"rate_limited"}}'
        ex.reply(body, 429, headers=[*JSON, ("Retry-After", "7"), ("X-Request-ID", "of-the-upstream")])

    path = shop.upstream.serve(handler)
    error = shop.error("await client.stream(url, {body: {}})", path)
    (ex,) = shop.upstream.seen(path)
    assert error == {
        "name": "StreamError",
        "message": "slow down",
        "code": "rate_limited",
        "status": 429,
        "retryAfter": 7,
        "requestId": ex.header("X-Request-ID").decode(),
    }


@pytest.mark.parametrize(
    ("body", "headers", "message", "code"),
    [
        (b"<h1>no</h1>", [("Content-Type", "text/html")], "HTTP 500 Internal Server Error", "http_500"),
        (b'event: error\ndata: {"error":{"message":"M","code":"C"}}\n\n', EVENTS, "M", "C"),
        (b'{"error":"M"}', JSON, "M", "http_500"),
        (b'{"error":{"message":"M","type":"T"}}', JSON, "M", "T"),
        (b'{"message":"M"}', JSON, "M", "http_500"),
        (b'{"error":{"mess', JSON, "HTTP 500 Internal Server Error", "http_500"),
        (b"", [], "HTTP 500 Internal Server Error", "http_500"),
        (b"x" * 300_000, JSON, "HTTP 500 Internal Server Error", "http_500"),
    ],
    ids=["html", "events", "text", "type", "flat", "half-json", "empty", "long"],
)
def test_an_http_error_of_any_shape_is_one(shop: Shop, body: bytes, headers: Any, message: str, code: str) -> None:
    path = shop.upstream.serve(lambda ex: ex.reply(body, 500, "Internal Server Error", headers))
    error = shop.error("await client.stream(url)", path)
    # gunicorn has words of its own for a status; HTTP/2 has none.
    assert (error["message"], error["code"], error["status"]) == (message, code, 500)


@pytest.mark.parametrize("headers", [JSON, [("Content-Type", "text/event-streams")], []], ids=["json", "alike", "none"])
def test_an_answer_that_is_no_event_stream_is_an_error(shop: Shop, headers: Any) -> None:
    path = shop.upstream.serve(answers(b"data: a\n\n", headers=headers))
    error = shop.error("await client.stream(url, {maxReconnectAttempts: 5})", path)
    assert (error["code"], error["status"]) == ("not_events", 200)
    assert len(shop.upstream.seen(path)) == 1


def test_a_stall_is_an_error_and_reaches_the_upstream(shop: Shop, clock: Callable[[int], None]) -> None:
    path = shop.upstream.by_hand()
    job = shop.start(
        """
        globalThis.kept = [];
        const onMessage = ({data}) => kept.push(data);
        await client.stream(url, {stallTimeout: 200, body: {}, maxReconnectAttempts: 3, onMessage});
        """,
        path,
    )
    ex = shop.upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(b"data: a\n\n")
    eventually(lambda: run(shop.place, "return kept.length") == 1, "the message")
    assert not ex.gone
    clock(201)
    ex.wait_gone()
    with pytest.raises(Thrown, match=r"Nothing came for 0\.2 s") as caught:
        job.result()
    assert caught.value.code == "stalled"
    assert len(shop.upstream.seen(path)) == 1


def test_a_heartbeat_is_a_sign_of_life(shop: Shop, clock: Callable[[int], None]) -> None:
    path = shop.upstream.by_hand()
    job = shop.start(
        """
        globalThis.beats = 0;
        const onProgress = ({heartbeats}) => { globalThis.beats = heartbeats; };
        return (await client.stream(url, {stallTimeout: 200, onProgress})).heartbeats;
        """,
        path,
    )
    ex = shop.upstream.next(path)
    ex.head(headers=EVENTS)
    for n in range(7):
        ex.send(b": beat\n\n")
        eventually(lambda n=n: run(shop.place, "return beats") == n + 1, "the heartbeat")
        clock(150)
        assert not ex.finished.wait(0.1)  # in all far longer than the client takes to look at its clock
    ex.end()
    assert job.result() == 7


def test_a_page_that_slept_reads_what_has_come_before_it_speaks_of_a_stall(
    shop: Shop, clock: Callable[[int], None]
) -> None:
    path = shop.upstream.by_hand()
    job = shop.start(
        """
        const s = client.stream(url, {stallTimeout: 300});
        const iterator = s[Symbol.asyncIterator]();
        globalThis.first = (await iterator.next()).value.data;
        return [(await iterator.next()).value.data, (await s).events];
        """,
        path,
    )
    ex = shop.upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(b"data: a\n\n")
    eventually(lambda: run(shop.place, "return globalThis.first") == "a", "the first message")
    # Asleep for longer than the stall is: the client's timer is due before it can read anything.
    asleep = shop.place.start("const until = Date.now() + 400; while (Date.now() < until); clock.pass(1800)")
    ex.send(b"data: b\n\n")
    ex.end()
    asleep.result()
    assert job.result() == ["b", 2]


def test_a_stall_before_the_head_is_noticed_too_and_a_post_is_not_repeated(
    shop: Shop, clock: Callable[[int], None]
) -> None:
    path = shop.upstream.by_hand()
    job = shop.start("await client.stream(url, {stallTimeout: 200, body: {}, maxReconnectAttempts: 3})", path)
    ex = shop.upstream.next(path)
    assert not ex.gone
    clock(201)
    ex.wait_gone()
    with pytest.raises(Thrown) as caught:
        job.result()
    assert caught.value.code == "stalled"
    assert len(shop.upstream.seen(path)) == 1


# --- Stopping


@pytest.mark.parametrize(
    "stop",
    ["s.abort()", "controller.abort()", "await iterator.return()"],
    ids=["abort", "signal", "iterator"],
)
@pytest.mark.parametrize("head", [True, False], ids=["streaming", "waiting"])
def test_a_stop_reaches_the_upstream(shop: Shop, stop: str, head: bool) -> None:
    path = shop.upstream.by_hand()
    job = shop.start(
        f"""
        const controller = new AbortController();
        const s = client.stream(url, {{signal: controller.signal, body: {{}}}});
        const iterator = s[Symbol.asyncIterator]();
        await new Promise((resolve) => {{ globalThis.go = resolve; }});
        {stop};
        return await s.catch((error) => error.code);
        """,
        path,
    )
    ex = shop.upstream.next(path)
    if head:
        ex.head(headers=EVENTS)
        ex.send(b"data: a\n\n")
    run(shop.place, "go()")
    ex.wait_gone()  # within its deadline, long before a stall would end it
    assert job.result() == "aborted"


def test_leaving_the_loop_is_a_stop(shop: Shop) -> None:
    path = shop.upstream.by_hand()
    job = shop.start("for await (const message of client.stream(url)) return message.data", path)
    ex = shop.upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(b"data: a\n\ndata: b\n\n")
    ex.wait_gone()
    assert job.result() == "a"
    assert run(shop.place, "return unhandled") == []


def test_after_a_stop_nothing_is_delivered(shop: Shop) -> None:
    path = shop.upstream.by_hand()
    job = shop.start(
        """
        const kept = [];
        const s = client.stream(url, {onMessage: ({data}) => { kept.push(data); s.abort(); }});
        kept.push(await s.catch((error) => error.code));
        return kept;
        """,
        path,
    )
    ex = shop.upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(b"data: a\n\ndata: b\n\ndata: c\n\n")
    ex.wait_gone()
    assert job.result() == ["a", "aborted"]


def test_a_signal_that_has_aborted_sends_nothing(shop: Shop) -> None:
    path = shop.upstream.serve(answers(DONE))
    assert shop.code("await client.stream(url, {signal: AbortSignal.abort()})", path) == "aborted"
    assert shop.upstream.seen(path) == []


def test_a_callback_that_throws_ends_the_stream_and_is_not_taken_for_the_networks_fault(shop: Shop) -> None:
    path = shop.upstream.by_hand()
    job = shop.start(
        """
        const options = {onMessage() { throw new RangeError("mine"); }, maxReconnectAttempts: 3};
        return await client.stream(url, options).catch(({code, cause}) => [code, cause.name, cause.message]);
        """,
        path,
    )
    ex = shop.upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(b"data: a\n\n")
    ex.wait_gone()
    assert job.result() == ["callback", "RangeError", "mine"]
    assert len(shop.upstream.seen(path)) == 1


@pytest.mark.parametrize("option", ["endMarker", "textOf"])
def test_so_does_a_function_of_ones_own_that_reads_messages(shop: Shop, option: str) -> None:
    """An endMarker that is no good at `[DONE]` is not a broken connection, and nothing is asked again for it."""
    path = shop.upstream.serve(answers(b"data: {}\n\n", DONE))
    error = shop.run(
        f"""
        const options = {{{option}: ({{data}}) => JSON.parse(data).text ?? "", onText() {{}}, maxReconnectAttempts: 3}};
        return await client.stream(url, options).catch(({{code, cause}}) => [code, cause.name]);
        """,
        path,
    )
    assert error == ["callback", "SyntaxError"]
    assert len(shop.upstream.seen(path)) == 1


# --- Failures that nobody listens to


@pytest.mark.parametrize(
    ("use", "unhandled"),
    [
        ("client.stream(url)", ["cut"]),
        ("client.stream(url, {onMessage() {}, onDone() {}})", ["cut"]),
        ("client.stream(url, {onError() {}})", []),
        ("client.stream(url).catch(() => {})", []),
        ("(async () => { for await (const _ of client.stream(url)); })().catch(() => {})", []),
        ("(async () => { for await (const _ of client.stream(url)); })()", ["cut"]),
        ("client.stream(url).abort()", []),
    ],
    ids=["nobody", "no-onError", "onError", "catch", "iterator", "iterator-uncaught", "aborted"],
)
def test_a_failure_is_silent_only_where_somebody_was_told(shop: Shop, use: str, unhandled: list[str]) -> None:
    path = shop.upstream.serve(answers(b"data: x", end="abort"))
    shop.run(
        f"""
        {use};
        await client.stream(url).catch(() => {{}});
        await new Promise((resolve) => setTimeout(resolve, 100));
        """,
        path,
    )
    if unhandled:
        eventually(lambda: run(shop.place, "return unhandled") == unhandled, "the unhandled rejection")
    assert run(shop.place, "return unhandled") == unhandled


# --- Asking again


def test_a_get_goes_on_where_it_was_cut(shop: Shop) -> None:
    cut, read = cut_once_read(shop.upstream, "retry: 60\nid: č1\ndata: a\n\ndata: lost".encode())
    path = shop.upstream.serve(
        in_turn(
            cut,
            lambda ex: ex.reply(b"{}", 503, headers=JSON),
            answers(b"data: b\n\nid: 2\ndata: c\n\n", DONE),
        )
    )
    kept, end, waits = shop.run(
        """
        const kept = [], waits = [];
        const end = await client.stream(url, {
            endMarker: "[DONE]", maxReconnectAttempts: 2,
            onMessage: ({data, id}) => { kept.push([data, id]); fetch(read); },
            onReconnect: ({attempt, waitMs, error}) =>
                waits.push([attempt, waitMs <= 60 * 2 ** (attempt - 2), error.code]),
        });
        return [kept, end, waits];
        """,
        path,
        read=shop.url(read),
    )
    assert kept == [["a", "č1"], ["b", "č1"], ["c", "2"], ["[DONE]", "2"]]
    assert waits == [[2, True, "cut"], [3, True, "http_503"]]
    assert (end["attempt"], end["events"], end["lastEventId"]) == (3, 4, "2")
    assert [ex.header("Last-Event-ID") for ex in shop.upstream.seen(path)] == [None, "č1".encode(), "č1".encode()]


def test_a_get_gives_up_after_so_many_attempts_with_the_last_failure(shop: Shop) -> None:
    path = shop.upstream.serve(answers(b"retry: 1\ndata: a\n\ndata: x", end="abort"))
    assert shop.code("await client.stream(url, {maxReconnectAttempts: 3})", path) == "cut"
    assert len(shop.upstream.seen(path)) == 4
    assert shop.code("await client.stream(url)", path) == "cut"
    assert len(shop.upstream.seen(path)) == 5


def test_a_feed_that_ends_now_and_then_goes_on_if_nothing_is_its_end(shop: Shop) -> None:
    path = shop.upstream.serve(
        in_turn(
            answers(b"retry: 1\nid: 1\ndata: a\n\n"),
            answers(b"id: 2\ndata: b\n\n"),
            lambda ex: ex.reply(status=204, framing="none"),
        )
    )
    kept = shop.run(
        """
        const kept = [];
        const options = {endMarker: () => false, maxReconnectAttempts: Infinity};
        try {
            for await (const {data} of client.stream(url, options)) kept.push(data);
        } catch ({code, status}) { kept.push(code, status); }
        return kept;
        """,
        path,
    )
    assert kept == ["a", "b", "cut", 204]
    assert [ex.header("Last-Event-ID") for ex in shop.upstream.seen(path)] == [None, b"1", b"2"]


def test_a_204_is_a_good_end_where_nothing_is_missing(shop: Shop) -> None:
    def no_more(ex: Exchange) -> None:
        ex.reply(status=204, framing="none")

    path = shop.upstream.serve(no_more)
    assert shop.run("return (await client.stream(url, {maxReconnectAttempts: 3})).status", path) == 204
    assert len(shop.upstream.seen(path)) == 1
    path = shop.upstream.serve(in_turn(answers(b"retry: 1\ndata: a\n\ndata: x", end="abort"), no_more))
    assert shop.error("await client.stream(url, {maxReconnectAttempts: 3})", path)["status"] == 204
    assert len(shop.upstream.seen(path)) == 2


@pytest.mark.parametrize("first", [b"data: a\n\n", b": beat\n\n", b"d"], ids=["event", "heartbeat", "one-byte"])
@pytest.mark.parametrize("end", ["clean", "abort"])
def test_a_post_is_never_sent_again_after_a_byte(shop: Shop, first: bytes, end: str) -> None:
    path = shop.upstream.serve(answers(b"retry: 1\n", first, end=end))
    code = shop.code('await client.stream(url, {body: {}, endMarker: "[DONE]", maxReconnectAttempts: 5})', path)
    assert code in ("cut", "upstream_cut")
    assert len(shop.upstream.seen(path)) == 1


def test_a_post_is_not_sent_again_after_a_head_alone(shop: Shop) -> None:
    path = shop.upstream.serve(answers(end="abort"))
    code = shop.code('await client.stream(url, {body: {}, endMarker: "[DONE]", maxReconnectAttempts: 5})', path)
    assert code in ("cut", "upstream_cut")
    assert len(shop.upstream.seen(path)) == 1


def test_a_post_that_was_refused_is_sent_again_after_the_time_that_was_named(shop: Shop) -> None:
    refused = [*JSON, ("Retry-After", "1")]
    path = shop.upstream.serve(
        in_turn(
            lambda ex: ex.reply(b"{}", 429, headers=refused),
            lambda ex: ex.reply(b"{}", 503, headers=refused),
            answers(DONE),
        )
    )
    assert shop.run("return (await client.stream(url, {body: {n: 1}, maxReconnectAttempts: 2})).attempt", path) == 3
    first, second, third = shop.upstream.seen(path)
    assert second.arrived - first.arrived >= 0.99  # timers are exact to a millisecond
    assert third.arrived - second.arrived >= 0.99
    assert {ex.body for ex in (first, second, third)} == {b'{"n":1}'}


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (503, [("x-should-retry", "false")]),
        (429, [("Retry-After", "3600")]),
        (500, []),
        (502, []),
        (504, []),
        (400, []),
        (401, []),
    ],
)
def test_a_post_with_another_answer_is_not_sent_again(shop: Shop, status: int, headers: Any) -> None:
    path = shop.upstream.serve(lambda ex: ex.reply(b"{}", status, headers=[*JSON, *headers]))
    error = shop.error("await client.stream(url, {body: {}, maxReconnectAttempts: 5})", path)
    assert error["status"] == status
    assert len(shop.upstream.seen(path)) == 1


def test_a_server_that_is_not_there_is_asked_again_and_then_is_a_network_error(shop: Shop) -> None:
    nowhere = f"http://127.0.0.1:{servers.free_port()}/"
    job = shop.place.start(
        """
        const waits = [];
        const options = {body: {}, maxReconnectAttempts: 2, onReconnect: ({waitMs}) => waits.push(waitMs)};
        const code = await client.stream(url, options).catch((error) => error.code);
        return [code, waits];
        """,
        url=nowhere,
    )
    code, waits = job.result()
    assert code == "network"
    assert len(waits) == 2
    assert waits[0] <= 1000
    assert waits[1] <= 2000


def test_an_option_that_is_undefined_or_null_is_not_given(shop: Shop) -> None:
    path = shop.upstream.serve(answers(b"data: a\n\n"))
    options = "{endMarker: undefined, maxReconnectAttempts: undefined, signal: null, ticket: null, body: {}}"
    assert shop.code(f'await new client.ChatStream({{url}}).stream("Hi", null, {options})', path) == "cut"
    assert shop.run(f"return (await client.stream(url, {options})).events", path) == 1
    refusing = shop.upstream.serve(lambda ex: ex.reply(b"{}", 503, headers=JSON))
    assert shop.error(f"await client.stream(url, {options})", refusing)["status"] == 503
    assert len(shop.upstream.seen(refusing)) == 1


def test_a_wait_ends_with_an_abort(shop: Shop) -> None:
    refused = [*JSON, ("Retry-After", "60")]
    path = shop.upstream.serve(lambda ex: ex.reply(b"{}", 503, headers=refused))
    assert (
        shop.code(
            "const s = client.stream(url, {maxReconnectAttempts: 5, onReconnect: () => s.abort()}); await s", path
        )
        == "aborted"
    )
    assert len(shop.upstream.seen(path)) == 1


def test_after_an_abort_no_ticket_is_asked_for(shop: Shop) -> None:
    path = shop.upstream.serve(lambda ex: ex.reply(b"{}", 503, headers=JSON))
    code, asked = shop.run(
        """
        let asked = 0;
        const ticket = () => `t${asked += 1}`;
        const s = client.stream(url, {ticket, maxReconnectAttempts: 5, onReconnect: () => setTimeout(() => s.abort())});
        return [await s.catch(({code}) => code), asked];
        """,
        path,
    )
    assert (code, asked) == ("aborted", 1)


def test_a_ticket_is_added_to_the_query_and_asked_for_again_each_time(shop: Shop) -> None:
    path = shop.upstream.serve(in_turn(answers(b"retry: 1\ndata: a\n\ndata: x", end="abort"), answers(DONE)))
    shop.run(
        """
        let n = 0;
        await client.stream(url + "?a=1#there", {ticket: async () => `t/${n += 1}`, maxReconnectAttempts: 1});
        await client.stream(url, {ticket: "still&same"});
        """,
        path,
    )
    assert [ex.target.partition(b"?")[2] for ex in shop.upstream.seen(path)] == [
        b"a=1&ticket=t%2F1",
        b"a=1&ticket=t%2F2",
        b"ticket=still%26same",
    ]


def test_a_ticket_that_cannot_be_had_is_an_error_that_does_not_tell_it(shop: Shop) -> None:
    path = shop.upstream.serve(answers(DONE))
    error = shop.error("await client.stream(url, {ticket: () => { throw new Error('login first') }})", path)
    assert (error["code"], error["message"]) == ("ticket", "No ticket: login first")
    assert shop.upstream.seen(path) == []


# --- Chats


def test_a_chat_posts_prompt_and_model_and_gives_the_text(shop: Shop) -> None:
    def chunk(text: str) -> bytes:
        return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"

    path = shop.upstream.serve(answers(chunk("Every "), chunk("\ud83d"), chunk("\udc18."), DONE))
    pieces, end, kept = shop.run(
        """
        const pieces = [], kept = [];
        const chat = new client.ChatStream({url, headers: {"X-Mine": "1"}});
        const end = await chat.stream("Hi", "m-1", {
            onText: (text, whole) => pieces.push(whole),
            onMessage: (message) => kept.push(message),
        });
        await chat.stream([{role: "user", content: "Hi"}]);
        return [pieces, end, kept];
        """,
        path,
    )
    assert pieces[0] == "Every "
    assert end["text"] == pieces[-1] == "Every 🐘."
    assert kept[-1] == {"event": "message", "data": "[DONE]", "id": ""}
    first, second = shop.upstream.seen(path)
    assert (first.header("X-Mine"), json.loads(first.body)) == (b"1", {"prompt": "Hi", "model": "m-1"})
    assert json.loads(second.body) == {"messages": [{"role": "user", "content": "Hi"}]}


def test_a_chat_without_its_end_marker_is_a_cut(shop: Shop) -> None:
    path = shop.upstream.serve(answers(b"data: {}\n\n"))
    assert shop.code('await new client.ChatStream({url}).stream("Hi")', path) == "cut"
    assert len(shop.upstream.seen(path)) == 1


def test_a_chat_with_anthropics_api_is_whole_at_message_stop_and_a_cut_without_it(shop: Shop) -> None:
    text = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Every byte."}}
    begun = b"event: content_block_delta\ndata: " + json.dumps(text).encode() + b"\n\n"
    stopped = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    code = 'return (await new client.ChatStream({url}).stream("Hi", null, {onText() {}})).text'
    assert shop.run(code, shop.upstream.serve(answers(begun, stopped))) == "Every byte."
    assert shop.code(code, shop.upstream.serve(answers(begun))) == "cut"


def test_a_chat_is_tried_six_times(shop: Shop) -> None:
    refused = [*JSON, ("Retry-After", "0")]
    path = shop.upstream.serve(lambda ex: ex.reply(b"{}", 503, headers=refused))
    job = shop.start('await new client.ChatStream({url}).stream("Hi")', path)
    shop.upstream.wait_for(6, path, deadline=15)
    with pytest.raises(Thrown):
        job.result()
    assert len(shop.upstream.seen(path)) == 6


# --- Node alone: a browser tries again by itself, or is not let through


def test_a_post_to_which_no_answer_came_is_sent_again(in_node: Shop) -> None:
    with Upstream() as upstream:
        path = upstream.serve(in_turn(lambda ex: ex.abort(), answers(DONE)))
        code = "return (await client.stream(url, {body: {}, maxReconnectAttempts: 1})).attempt"
        assert run(in_node.place, code, url=upstream.base_url + path) == 2
        assert len(upstream.seen(path)) == 2


def test_the_count_of_attempts_begins_anew_after_a_long_connection(in_node: Shop) -> None:
    """The clock that the client looks at runs a thousand times as fast, so that 50 ms are a long time."""
    path = in_node.upstream.by_hand()
    job = in_node.start(
        """
        const real = performance;
        const clock = (value) => Object.defineProperty(globalThis, "performance", {value, configurable: true});
        const fast = {now: () => real.now() * 1000, markResourceTiming() {}};  // what Node 18's fetch asks for
        clock(fast);
        const options = {stallTimeout: 0, endMarker: "[DONE]", maxReconnectAttempts: 1};
        try {
            return (await client.stream(url, options)).attempt;
        } finally {
            clock(real);
        }
        """,
        path,
    )
    for _ in range(3):
        ex = in_node.upstream.next(path)
        ex.head(headers=EVENTS)
        ex.send(b"retry: 1\ndata: a\n\n")
        assert not ex.finished.wait(0.05)  # how long the connection lasts is the point
        ex.end()
    ex = in_node.upstream.next(path)
    ex.head(headers=EVENTS)
    ex.send(DONE)
    ex.end()
    assert job.result() == 4


def test_a_ticket_of_the_service_opens_a_stream_and_the_upstream_does_not_see_it(in_node: Shop) -> None:
    with Upstream() as upstream:
        path = upstream.serve(answers(DONE))
        env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_CLIENT_KEYS": "client-key-1"}
        with servers.gunicorn(env) as relay:
            code = """
            const ticket = async ({signal}) => {
                const headers = {Authorization: "Bearer client-key-1"};
                return (await (await fetch(base + "/ticket", {method: "POST", headers, signal})).json()).ticket;
            };
            return [
                await client.stream(url).catch(({status}) => status),
                (await client.stream(url, {ticket})).events,
            ];
            """
            values = {"base": relay.base_url, "url": f"{relay.base_url}/v1{path}?a=1"}
            assert run(in_node.place, code, **values) == [401, 1]
        (ex,) = upstream.seen(path)
        assert ex.target.endswith(b"?a=1")
