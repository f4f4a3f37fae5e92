"""Real SDKs through the relay, unchanged but for `base_url`.

An answer that is whole never fails, whatever silences the relay had to fill; one that is not is never taken for whole,
whoever cut it and where; and what the upstream refuses, the SDK raises as if it had asked the upstream itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anthropic
import httpx2  # what both SDKs talk HTTP with; anthropic's lets its errors through
import openai
import pytest
from harness import DEADLINE, DeadlineExceeded, cases, eventually, llm, servers
from harness.client import Connection
from harness.upstream import PeerGone, Upstream, deaf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from conftest import Service
    from harness.servers import Gunicorn
    from harness.upstream import Exchange, Framing, Handler

    Heard = Callable[[str], object]
    Error = openai.APIError | anthropic.APIError

CLIENT_KEY = "sk-the-clients-own"
UPSTREAM_KEY = "sk-the-relays-own"
TRIES = 5  # of what a relay does only if it is not held up for as long as its clock runs
BEAT = b"\n: keep-alive"  # at the beginning of a line: as a header's value it says something else
CHAT, RESPONSES, MESSAGES, MODELS = "/chat/completions", "/responses", "/messages", "/models"
ASKED: list[Any] = [{"role": "user", "content": "Well?"}]


@pytest.fixture(autouse=True)
def _no_settings_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDKs read keys, addresses and proxies from the environment."""
    for name in os.environ:
        if name.startswith(("OPENAI_", "ANTHROPIC_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


# The SDKs


_clients: list[openai.OpenAI | anthropic.Anthropic] = []


@functools.cache
def an_openai(origin: str, **options: Any) -> openai.OpenAI:
    """One for all calls of a test, since they are slow to make; and it has to live on after what it runs into."""
    client = openai.OpenAI(base_url=f"{origin}/v1", api_key=CLIENT_KEY, **options)
    _clients.append(client)
    return client


@functools.cache
def an_anthropic(origin: str, **options: Any) -> anthropic.Anthropic:
    client = anthropic.Anthropic(base_url=origin, api_key=CLIENT_KEY, **options)
    _clients.append(client)
    return client


@pytest.fixture(autouse=True)
def _new_clients() -> Iterator[None]:
    yield
    an_openai.cache_clear()
    an_anthropic.cache_clear()
    while _clients:
        _clients.pop().close()


def stream_chat(origin: str, heard: Heard, **options: Any) -> str:
    """Ask for a stream, tell `heard` each word, and give the answer's own last mark."""
    client, finish = an_openai(origin, **options), ""
    with client.chat.completions.create(model=llm.MODEL, messages=ASKED, stream=True) as stream:
        for chunk in stream:
            if word := chunk.choices[0].delta.content:
                heard(word)
            finish = chunk.choices[0].finish_reason or finish
    return finish


def stream_response(origin: str, heard: Heard, **options: Any) -> str:
    client, finish = an_openai(origin, **options), ""
    with client.responses.create(model=llm.MODEL, input="Well?", stream=True) as stream:
        for step in stream:
            if step.type == "response.output_text.delta":
                heard(step.delta)
            elif step.type == "response.completed":
                finish = str(step.response.status)
    return finish


def stream_message(origin: str, heard: Heard, **options: Any) -> str:
    client = an_anthropic(origin, **options)
    with client.messages.stream(model=llm.MODEL, messages=ASKED, max_tokens=100) as stream:
        for word in stream.text_stream:
            heard(word)
        return str(stream.get_final_message().stop_reason)


def async_stream_chat(origin: str, heard: Heard, **options: Any) -> str:
    async def main() -> str:
        finish = ""
        async with (
            openai.AsyncOpenAI(base_url=f"{origin}/v1", api_key=CLIENT_KEY, **options) as client,
            await client.chat.completions.create(model=llm.MODEL, messages=ASKED, stream=True) as stream,
        ):
            async for chunk in stream:
                if word := chunk.choices[0].delta.content:
                    heard(word)
                finish = chunk.choices[0].finish_reason or finish
        return finish

    return asyncio.run(main())


def async_stream_message(origin: str, heard: Heard, **options: Any) -> str:
    async def main() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=origin, api_key=CLIENT_KEY, **options) as client,
            client.messages.stream(model=llm.MODEL, messages=ASKED, max_tokens=100) as stream,
        ):
            async for word in stream.text_stream:
                heard(word)
            return str((await stream.get_final_message()).stop_reason)

    return asyncio.run(main())


def ask_chat(origin: str, **options: Any) -> str | None:
    """Ask for an answer in one piece; gives its text."""
    client = an_openai(origin, **options)
    return client.chat.completions.create(model=llm.MODEL, messages=ASKED).choices[0].message.content


def ask_response(origin: str, **options: Any) -> str | None:
    return an_openai(origin, **options).responses.create(model=llm.MODEL, input="Well?").output_text


def ask_message(origin: str, **options: Any) -> str | None:
    client = an_anthropic(origin, **options)
    (block,) = client.messages.create(model=llm.MODEL, messages=ASKED, max_tokens=100).content
    return block.text if block.type == "text" else None


@dataclass(frozen=True)
class Sdk:
    """One way of asking, and what is true of it."""

    module: Any  # openai and anthropic call their errors alike
    path: str  # below the mount
    stream: Callable[..., str]
    ask: Callable[..., str | None]
    events: Callable[..., list[bytes]]
    answer: Callable[[], bytes]
    finish: str  # the last mark of a whole answer
    before: int  # events before the first word

    def words(self, events: int) -> list[str]:
        """What the first so many events say."""
        return list(llm.WORDS[: max(0, events - self.before)])

    @property
    def broken(self) -> tuple[type[Exception], ...]:
        """What a connection that breaks off inside a body is raised as."""
        if self.module is openai:
            return (openai.APIConnectionError,)
        return (anthropic.APIConnectionError, httpx2.TransportError)

    def code(self, error: Error) -> str | None:
        """The relay's code of what it has told in a body or an event."""
        if isinstance(error, openai.APIError):
            return error.code
        body: Any = error.body
        return body["error"]["code"] if isinstance(body, dict) else None

    def listen(self, origin: str, **options: Any) -> None:
        """Ask for a stream, and have it whole."""
        heard: list[str] = []
        finish = self.stream(origin, heard.append, **options)
        assert ("".join(heard), finish) == (llm.TEXT, self.finish)

    def fail(self, origin: str, heard: Heard = lambda _: None, **options: Any) -> str | None:
        """Ask for a stream; gives the code of the error that the SDK raises, None for a connection that breaks off."""
        with pytest.raises((self.module.APIError, *self.broken)) as caught:
            self.stream(origin, heard, **options)
        error = caught.value
        return None if isinstance(error, self.broken) else self.code(error)


_CHAT = (openai, CHAT, stream_chat, ask_chat, llm.chat_events, llm.chat_answer, "stop", 1)
_MESSAGE = (anthropic, MESSAGES, stream_message, ask_message, llm.message_events, llm.message_answer, "end_turn", 3)
SDKS = {
    "openai-chat": Sdk(*_CHAT),
    "openai-responses": Sdk(
        openai, RESPONSES, stream_response, ask_response, llm.response_events, llm.response_answer, "completed", 1
    ),
    "anthropic": Sdk(*_MESSAGE),
}
ASYNC_SDKS = {
    "openai-chat-async": Sdk(*_CHAT[:2], async_stream_chat, *_CHAT[3:]),
    "anthropic-async": Sdk(*_MESSAGE[:2], async_stream_message, *_MESSAGE[3:]),
}


def each(sdks: dict[str, Sdk]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sdk", [pytest.param(sdk, id=name) for name, sdk in sdks.items()])


each_sdk = each(SDKS)
each_sdk_and_async = each(SDKS | ASYNC_SDKS)
each_company = each({name: SDKS[name] for name in ("openai-chat", "anthropic")})


# Where they ask


@dataclass(frozen=True)
class Place:
    """A relay, and the upstream behind it."""

    upstream: Upstream
    relay: Gunicorn
    port: int

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self, path: str, handler: Handler) -> None:
        """Have the upstream answer a path so from now on, and forget what it was asked before."""
        self.upstream.forget(path)
        self.upstream.serve(handler, path)

    def asked(self, path: str) -> list[Exchange]:
        return self.upstream.seen(path)

    def asked_once(self, path: str) -> None:
        """One request has come, or is on its way: the relay did not wait for what the upstream makes of it."""
        self.upstream.wait_for(1, path)
        assert len(self.asked(path)) == 1

    def _clean(self) -> None:
        for path in (CHAT, RESPONSES, MESSAGES, MODELS):
            self.upstream.forget(path)


@contextlib.contextmanager
def relay(**settings: str) -> Iterator[Place]:
    """A relay with settings of its own, and an upstream of its own unless the settings name one."""
    with Upstream() as upstream, servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url} | settings) as gunicorn:
        yield Place(upstream, gunicorn, gunicorn.port)


@contextlib.contextmanager
def for_one_test(place: Place) -> Iterator[Place]:
    yield place
    place._clean()
    place.upstream.check()


@pytest.fixture
def place(hop: Service) -> Iterator[Place]:
    """The service as shipped, once directly and once through nginx."""
    with for_one_test(Place(hop.upstream, hop.relay, hop.port)) as place:
        yield place


@pytest.fixture
def direct(service: Service) -> Iterator[Place]:
    """The service as shipped, without nginx."""
    with for_one_test(Place(service.upstream, service.relay, service.port)) as place:
        yield place


# Relays that give up soon, each for one reason alone: on a busy machine the other clocks would run out, too.


@pytest.fixture(scope="module")
def _waiting_for_an_answer() -> Iterator[Place]:
    with relay(RELAY_FIRST_BYTE_TIMEOUT="0.5") as place:
        yield place


@pytest.fixture
def waiting_for_an_answer(_waiting_for_an_answer: Place) -> Iterator[Place]:
    """A relay that soon gives up an upstream without an answer; the hold does not come at all."""
    with for_one_test(_waiting_for_an_answer) as place:
        yield place


@pytest.fixture(scope="module")
def _waiting_for_more() -> Iterator[Place]:
    with relay(RELAY_IDLE_TIMEOUT="0.5", RELAY_HEARTBEAT="0.1") as place:
        yield place


@pytest.fixture
def waiting_for_more(_waiting_for_more: Place) -> Iterator[Place]:
    """One that soon gives up a silent upstream; heartbeats come sooner."""
    with for_one_test(_waiting_for_more) as place:
        yield place


@pytest.fixture(scope="module")
def _waiting_for_a_reader() -> Iterator[Place]:
    with relay(RELAY_WRITE_TIMEOUT="0.5") as place:
        yield place


@pytest.fixture
def waiting_for_a_reader(_waiting_for_a_reader: Place) -> Iterator[Place]:
    """One that soon gives up a client that takes nothing."""
    with for_one_test(_waiting_for_a_reader) as place:
        yield place


@pytest.fixture(scope="module")
def _beating() -> Iterator[Place]:
    with relay(RELAY_HEARTBEAT="0.05", RELAY_HOLD="0.15") as place:
        yield place


@pytest.fixture(scope="module")
def _beating_behind_nginx(_beating: Place) -> Iterator[Place]:
    with servers.nginx(_beating.relay.port, _beating.relay.admin_port) as proxy:
        yield Place(_beating.upstream, _beating.relay, proxy.port)


@pytest.fixture
def beating(_beating: Place) -> Iterator[Place]:
    """A relay that gives up late, but soon fills a silence."""
    with for_one_test(_beating) as place:
        yield place


@pytest.fixture
def beating_behind_nginx(_beating_behind_nginx: Place) -> Iterator[Place]:
    with for_one_test(_beating_behind_nginx) as place:
        yield place


class Tap:
    """A port in front of another that passes on bytes and ends as they come, and keeps what was answered.

    So an upstream can wait until the relay has written something, with the SDK between them none the wiser.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._changed = threading.Condition()
        self._answered = bytearray()
        self._over = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._changed:
            self._over = True
            self._changed.notify_all()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE)
        for sock in self._sockets:
            sock.close()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def count(self, what: bytes) -> int:
        """How often it was answered so far."""
        with self._changed:
            return self._answered.count(what)

    def wait_for(self, what: bytes, times: int = 1) -> None:
        """Wait until it was answered so often. Raises PeerGone if the test ends first, DeadlineExceeded if nothing."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._over or self._answered.count(what) >= times, DEADLINE):
                raise DeadlineExceeded(f"{times} times {what!r} in {bytes(self._answered[-400:])!r}")
            if self._answered.count(what) < times:
                raise PeerGone("the test is over")

    def wait_beats(self, more: int = 2) -> None:
        """Wait for so many more heartbeats."""
        self.wait_for(BEAT, self.count(BEAT) + more)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="tap", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [client, server]
            self._start(self._copy, client, server, None)
            self._start(self._copy, server, client, self._answered)

    def _copy(self, source: socket.socket, target: socket.socket, kept: bytearray | None) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
                if kept is not None:
                    with self._changed:
                        kept += data
                        self._changed.notify_all()
        except OSError:  # a reset of one side is one of the other
            with contextlib.suppress(OSError):
                target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def tapped(beating: Place) -> Iterator[Tap]:
    with Tap(beating.port) as tap:
        yield tap


# What an upstream does


def answers(body: bytes, status: int = 200, *more: tuple[str, str], reason: str = "So") -> Handler:
    return lambda ex: ex.reply(body, status, reason, [*llm.JSON, *more])


def streams(events: list[bytes], framing: Framing = "chunked") -> Handler:
    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS, framing=framing, length=sum(map(len, events)))
        for event in events:
            ex.send(event)
        ex.end()

    return handler


def stalls(events: list[bytes]) -> Handler:
    """Sends these, at once, and falls silent, until it is given up."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)

    def handler(ex: Exchange) -> None:
        # In one piece with the head: the relay's clocks run between two.
        ex.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        ex.wait_gone()

    return handler


def never_answers(ex: Exchange) -> None:
    ex.wait_gone()


def stays_away(ex: Exchange) -> None:
    """Hangs up on the request."""
    ex.reset()


# What the upstream says


@each_sdk_and_async
@pytest.mark.parametrize(
    ("end", "ids", "framing", "cut"),
    [
        pytest.param("\n", False, "chunked", cases.by_events, id="lf-chunked-events"),
        pytest.param("\r\n", True, "length", cases.by_bytes, id="crlf-ids-length-bytes"),
        pytest.param("\r", True, "close", cases.whole, id="cr-ids-close-whole"),
        pytest.param("\n", True, "chunked", lambda body: cases.at_random(body, 1), id="lf-ids-chunked-random"),
    ],
)
def test_a_streamed_answer_comes_whole(
    place: Place, sdk: Sdk, end: str, ids: bool, framing: Framing, cut: Callable[[bytes], list[bytes]]
) -> None:
    place.serve(sdk.path, streams(cut(b"".join(sdk.events(ids=ids, end=end))), framing))
    sdk.listen(place.origin)
    (asked,) = place.asked(sdk.path)
    assert json.loads(asked.body)["stream"] is True


def test_each_event_comes_as_it_was_sent(place: Place) -> None:
    """Every field of every event, not only the words."""
    place.serve(CHAT, streams(llm.chat_events()))
    place.serve(RESPONSES, streams(llm.response_events()))
    place.serve(MESSAGES, streams(llm.message_events()))
    client = an_openai(place.origin)
    chunks = client.chat.completions.create(model=llm.MODEL, messages=ASKED, stream=True)
    assert [chunk.to_dict() for chunk in chunks] == llm.chat_chunks()
    steps = client.responses.create(model=llm.MODEL, input="Well?", stream=True)
    assert [step.to_dict() for step in steps] == llm.response_steps()
    raw = an_anthropic(place.origin).messages.create(model=llm.MODEL, messages=ASKED, max_tokens=100, stream=True)
    # The SDK keeps the upstream's pings to itself.
    assert [step.to_dict() for step in raw] == [step for step in llm.message_steps() if step["type"] != "ping"]


@each_sdk
def test_an_answer_in_one_piece(place: Place, sdk: Sdk) -> None:
    place.serve(sdk.path, answers(sdk.answer()))
    assert sdk.ask(place.origin) == llm.TEXT
    (asked,) = place.asked(sdk.path)
    assert "stream" not in json.loads(asked.body)


def test_the_list_of_models(place: Place) -> None:
    place.serve(MODELS, answers(llm.models_answer()))
    assert [model.id for model in an_openai(place.origin).models.list()] == [llm.MODEL, "made-up-2"]


@each_sdk
def test_a_refused_key_is_an_authentication_error(place: Place, sdk: Sdk) -> None:
    body = llm.openai_error("no such key", "authentication_error", "invalid_api_key")
    place.serve(sdk.path, answers(body, 401))
    for call in (sdk.ask, lambda origin: sdk.stream(origin, [].append)):
        with pytest.raises(sdk.module.AuthenticationError, match="no such key") as caught:
            call(place.origin)
        assert caught.value.response.content == body
    assert len(place.asked(sdk.path)) == 2


@each_company
def test_a_rate_limit_shows_when_to_come_again(place: Place, sdk: Sdk) -> None:
    limits = [("Retry-After", "17"), ("retry-after-ms", "16543"), ("x-ratelimit-remaining-requests", "0")]
    place.serve(sdk.path, answers(llm.openai_error("slower", "requests", "rate_limit_exceeded"), 429, *limits))
    with pytest.raises(sdk.module.RateLimitError, match="slower") as caught:
        sdk.stream(place.origin, [].append, max_retries=0)
    for name, value in limits:
        assert caught.value.response.headers[name] == value


@each_company
def test_the_sdk_comes_again_when_the_rate_limit_says_so(direct: Place, sdk: Sdk) -> None:
    """By itself it would after half a second at most."""

    def handler(ex: Exchange) -> None:
        if ex.header("x-stainless-retry-count") == b"0":
            answers(b"{}", 429, ("Retry-After", "1"))(ex)
        else:
            streams(sdk.events())(ex)

    direct.serve(sdk.path, handler)
    sdk.listen(direct.origin)
    first, second = direct.asked(sdk.path)
    assert second.arrived - first.arrived >= 1
    assert second.body == first.body


@each_sdk
def test_what_the_upstream_says_of_a_second_try_holds(direct: Place, sdk: Sdk) -> None:
    body = llm.openai_error("overloaded for long", "overloaded_error", "overloaded")
    direct.serve(sdk.path, answers(body, 503, ("x-should-retry", "false")))
    with pytest.raises(sdk.module.InternalServerError, match="overloaded for long"):
        sdk.ask(direct.origin)
    assert len(direct.asked(sdk.path)) == 1


def test_an_overloaded_upstream(place: Place) -> None:
    body = llm.anthropic_error("Overloaded", "overloaded_error")
    place.serve(MESSAGES, answers(body, 529, ("request-id", "req_1"), reason=""))
    with pytest.raises(anthropic.APIStatusError, match="Overloaded") as caught:
        stream_message(place.origin, [].append, max_retries=0)
    error = caught.value
    assert (error.status_code, error.type, error.request_id) == (529, "overloaded_error", "req_1")


@each_sdk
def test_an_error_inside_a_stream_is_raised(place: Place, sdk: Sdk) -> None:
    """The upstream's own, after some words: its fields arrive, and nothing of the relay's."""
    if sdk.module is openai:
        error = llm.event(llm.openai_error("a tool went wrong", "server_error", "tool_use_failed"))
    else:
        error = llm.event(llm.anthropic_error("Overloaded", "overloaded_error"), "error")
    events = sdk.events()[:5]
    place.serve(sdk.path, streams([*events, error]))
    heard: list[str] = []
    with pytest.raises(sdk.module.APIError) as caught:
        sdk.stream(place.origin, heard.append)
    assert heard == sdk.words(5)
    told = caught.value
    if sdk.module is openai:
        assert (told.message, told.code) == ("a tool went wrong", "tool_use_failed")
    else:
        assert (told.body["error"]["type"], told.body["request_id"]) == ("overloaded_error", "req_1")
    assert len(place.asked(sdk.path)) == 1


def test_the_clients_own_key_goes_through(place: Place) -> None:
    place.serve(CHAT, answers(llm.chat_answer()))
    place.serve(MESSAGES, answers(llm.message_answer()))
    ask_chat(place.origin)
    ask_message(place.origin)
    (chat,), (message,) = place.asked(CHAT), place.asked(MESSAGES)
    for asked in (chat, message):  # anthropic's SDK too puts an `api_key` into Authorization, since 2.0
        assert asked.all("Authorization") == [f"Bearer {CLIENT_KEY}".encode()]
        assert len([value for _, value in asked.headers if CLIENT_KEY.encode() in value]) == 1
    assert len(message.all("anthropic-version")) == 1


def test_request_ids(place: Place) -> None:
    """Each SDK shows an id that one of the two will find in its log."""
    place.serve(CHAT, answers(llm.chat_answer(), 200, ("x-request-id", "up-1")))
    place.serve(MESSAGES, answers(llm.message_answer(), 200, ("request-id", "req_1")))
    raw = an_openai(place.origin).chat.completions.with_raw_response.create(model=llm.MODEL, messages=ASKED)
    message = an_anthropic(place.origin).messages.create(model=llm.MODEL, messages=ASKED, max_tokens=100)
    (chat,) = place.asked(CHAT)
    assert raw.headers["x-upstream-request-id"] == "up-1"
    assert raw.request_id == (chat.header("X-Request-ID") or b"").decode()
    assert message._request_id == "req_1"


def test_with_an_upstream_key_the_clients_goes_nowhere() -> None:
    with relay(RELAY_UPSTREAM_KEY=UPSTREAM_KEY, RELAY_UPSTREAM_KEY_HEADER="x-api-key") as keyed:
        for sdk in SDKS.values():
            keyed.serve(sdk.path, streams(sdk.events()))
            sdk.listen(keyed.origin)
            (asked,) = keyed.asked(sdk.path)
            assert (asked.all("x-api-key"), asked.all("Authorization")) == ([UPSTREAM_KEY.encode()], [])
            assert not [value for _, value in asked.headers if CLIENT_KEY.encode() in value]
        # The key is for inference; the SDK tells of anything else as a status that it knows.
        with pytest.raises(openai.PermissionDeniedError) as caught:
            an_openai(keyed.origin).files.delete("file-1")
        assert caught.value.code == "path_not_allowed"
        assert b"DELETE" not in [ex.method for ex in keyed.upstream.seen()]


# Ends: the upstream's


def cut_after(body: bytes, size: int, framing: Framing = "chunked") -> Handler:
    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS, framing=framing, length=len(body))
        ex.send(body[:size])
        ex.abort()

    return handler


@each_sdk_and_async
def test_an_upstream_that_ends_between_events_is_an_error_with_its_code(place: Place, sdk: Sdk) -> None:
    """Before the first event, and after each that is not the last."""
    events = sdk.events()
    for whole in range(len(events)):
        framing: Framing = "length" if whole % 2 else "chunked"
        place.serve(sdk.path, cut_after(b"".join(events), sum(map(len, events[:whole])), framing))
        heard: list[str] = []
        assert sdk.fail(place.origin, heard.append) == "upstream_cut", whole
        assert heard == sdk.words(whole)
        assert len(place.asked(sdk.path)) == 1


@each_sdk_and_async
def test_an_upstream_that_ends_inside_an_event_is_a_broken_connection(place: Place, sdk: Sdk) -> None:
    """In the first, in one with a word, in the last: inside a name, a value, a line end."""
    events = sdk.events()
    body = b"".join(events)
    for whole in (0, sdk.before, len(events) - 1):
        start, size = sum(map(len, events[:whole])), len(events[whole])
        for within in (5, size // 2, size - 1):
            place.serve(sdk.path, cut_after(body, start + within))
            heard: list[str] = []
            assert sdk.fail(place.origin, heard.append) is None, (whole, within)
            assert heard == sdk.words(whole)
            assert len(place.asked(sdk.path)) == 1


@each_sdk
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_cut_answer_is_never_taken_for_whole(direct: Place, sdk: Sdk, end: str) -> None:
    """Cut everywhere, and at each byte around the ends of the last events.

    All but the last line end is a whole answer: OpenAI's SDK has its `[DONE]` when a CR LF has begun.
    """
    events = sdk.events(ids=True, end=end)
    body = b"".join(events)
    late = {len(body) - back for back in range(len(end), 8)}
    late |= {len(body) - len(events[-1]) + off for off in range(-4, 5)}
    for size in sorted({*range(0, len(body), 311), *late}):
        direct.serve(sdk.path, cut_after(body, size))
        heard: list[str] = []
        whole = next(n for n in range(len(events)) if sum(map(len, events[: n + 1])) > size)
        assert sdk.fail(direct.origin, heard.append) in ("upstream_cut", None), size
        assert sdk.words(whole) == heard[: len(sdk.words(whole))]


@each_sdk
def test_an_upstream_that_resets_is_an_error(direct: Place, sdk: Sdk) -> None:
    """What was on its way may be lost, so that nothing else is sure."""

    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        for event in sdk.events()[:-1]:
            ex.send(event)
        ex.reset()

    direct.serve(sdk.path, handler)
    assert sdk.fail(direct.origin, max_retries=0) in ("upstream_cut", "upstream_error", None)


@each_sdk
@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_an_answer_in_one_piece_that_is_cut_is_an_error(place: Place, sdk: Sdk, framing: Framing) -> None:
    body = sdk.answer()

    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.JSON, framing=framing, length=len(body) + 1)
        ex.send(body)  # all but the end: as JSON it would do
        ex.abort()

    place.serve(sdk.path, handler)
    with pytest.raises(sdk.broken):
        sdk.ask(place.origin, max_retries=0)


def test_what_comes_after_the_end_mark_costs_no_whole_answer(place: Place) -> None:
    """OpenAI's SDK has its answer with `[DONE]`, and need not hear how the connection ends."""
    body = b"".join(llm.chat_events())
    place.serve(CHAT, cut_after(body, len(body)))
    SDKS["openai-chat"].listen(place.origin)


@each_sdk
def test_an_upstream_that_hangs_up_on_the_request_is_asked_once(place: Place, sdk: Sdk) -> None:
    """It may have begun to work on it, and would be paid twice."""
    place.serve(sdk.path, stays_away)
    for call in (sdk.ask, lambda origin: sdk.stream(origin, [].append)):
        before = len(place.asked(sdk.path))
        with pytest.raises(sdk.module.InternalServerError) as caught:
            call(place.origin)
        assert (caught.value.status_code, sdk.code(caught.value)) == (502, "upstream_error")
        assert len(place.asked(sdk.path)) == before + 1


# Ends: the relay's


@each_sdk
def test_an_upstream_that_does_not_answer_is_asked_once(waiting_for_an_answer: Place, sdk: Sdk) -> None:
    """A 504 that the SDKs would repeat twice, were it not for x-should-retry."""
    place = waiting_for_an_answer
    place.serve(sdk.path, never_answers)
    began = time.monotonic()
    with pytest.raises(sdk.module.InternalServerError) as caught:
        sdk.stream(place.origin, [].append)
    assert time.monotonic() - began >= 0.5
    assert (caught.value.status_code, sdk.code(caught.value)) == (504, "first_byte_timeout")
    assert caught.value.response.headers["x-should-retry"] == "false"
    place.asked_once(sdk.path)


@each_sdk
def test_an_answer_in_one_piece_that_does_not_come_is_asked_for_once(waiting_for_an_answer: Place, sdk: Sdk) -> None:
    place = waiting_for_an_answer
    place.serve(sdk.path, never_answers)
    with pytest.raises(sdk.module.InternalServerError) as caught:
        sdk.ask(place.origin)
    assert (caught.value.status_code, sdk.code(caught.value)) == (504, "first_byte_timeout")
    place.asked_once(sdk.path)


@each_sdk_and_async
def test_an_upstream_that_falls_silent_between_events_is_an_error_with_its_code(
    waiting_for_more: Place, sdk: Sdk
) -> None:
    """Heartbeats keep the connection, and do not count as life of the upstream's."""
    place = waiting_for_more
    with Tap(place.port) as tap:
        for _ in range(TRIES):
            place.serve(sdk.path, stalls(sdk.events(ids=True)[:5]))
            heard: list[str] = []
            assert sdk.fail(tap.origin, heard.append) == "idle_timeout"
            assert heard == sdk.words(5)
            assert len(place.asked(sdk.path)) == 1
            if tap.count(BEAT) >= 1:
                return
    pytest.fail("no heartbeat before the end")


@each_sdk
def test_an_upstream_that_falls_silent_inside_an_event_is_a_broken_connection(
    waiting_for_more: Place, sdk: Sdk
) -> None:
    place = waiting_for_more
    *events, begun = sdk.events()[:5]
    place.serve(sdk.path, stalls([*events, begun[:-1]]))
    heard: list[str] = []
    assert sdk.fail(place.origin, heard.append) is None
    assert heard == sdk.words(4)
    assert len(place.asked(sdk.path)) == 1


@each_sdk
def test_a_reader_that_stops_for_too_long_learns_that_it_missed_something(
    waiting_for_a_reader: Place, sdk: Sdk
) -> None:
    given_up = threading.Event()
    events = sdk.events()
    filler = b": " + b"x" * 100_000 + b"\n\n"  # bytes that cost the SDK little

    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        for event in events[: sdk.before + 1]:
            ex.send(event)
        try:
            while True:
                ex.send(filler)
        finally:
            given_up.set()

    def heard(_: str) -> None:
        assert given_up.wait(DEADLINE)

    waiting_for_a_reader.serve(sdk.path, handler)
    assert sdk.fail(waiting_for_a_reader.origin, heard) is None


def test_an_upstream_that_cannot_be_reached() -> None:
    """Nothing was sent and nothing can cost twice, so that the SDKs' own tries go on."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        with relay(RELAY_UPSTREAM_URL=f"http://127.0.0.1:{nobody.getsockname()[1]}") as place:
            for sdk in SDKS.values():
                place.relay.mark()
                with pytest.raises(sdk.module.InternalServerError) as caught:
                    sdk.stream(place.origin, [].append, max_retries=1)
                assert (caught.value.status_code, sdk.code(caught.value)) == (502, "upstream_unreachable")
                eventually(lambda: place.relay.log_since_mark().count('"status": 502') == 2, "two lines in the log")


def test_an_upstream_that_takes_no_connection() -> None:
    with deaf() as port, relay(RELAY_UPSTREAM_URL=f"http://127.0.0.1:{port}", RELAY_CONNECT_TIMEOUT="0.2") as place:
        for sdk in SDKS.values():
            with pytest.raises(sdk.module.InternalServerError) as caught:
                sdk.stream(place.origin, [].append, max_retries=0)
            assert (caught.value.status_code, sdk.code(caught.value)) == (504, "connect_timeout")


def test_a_relay_that_stops_says_so() -> None:
    sdks = list(SDKS.values())
    with relay(RELAY_DRAIN="0.3") as place:
        # Told to stop when each has heard its first word.
        begun = threading.Barrier(len(sdks), lambda: place.relay.send_signal(signal.SIGTERM), DEADLINE)

        def listen(sdk: Sdk) -> tuple[str | None, list[str]]:
            heard: list[str] = []

            def hear(word: str) -> None:
                heard.append(word)
                if len(heard) == 1:
                    begun.wait()

            return sdk.fail(place.origin, hear), heard

        for sdk in sdks:
            place.serve(sdk.path, stalls(sdk.events()[:5]))
        with ThreadPoolExecutor(len(sdks)) as pool:
            assert list(pool.map(listen, sdks)) == [("drained", sdk.words(5)) for sdk in sdks]
        place.relay.wait()


class EnoughError(Exception):
    """The person at the other end has heard enough."""


@each_sdk_and_async
def test_an_sdk_that_leaves_ends_the_stream_upstream(place: Place, sdk: Sdk) -> None:
    def leave(_: str) -> None:
        raise EnoughError

    place.serve(sdk.path, stalls(sdk.events()[:5]))
    with pytest.raises(EnoughError):
        sdk.stream(place.origin, leave)
    (asked,) = place.asked(sdk.path)
    assert asked.finished.wait(DEADLINE)


# Silence: heartbeats and the hold


def falls_silent(tap: Tap, sdk: Sdk, events: list[bytes]) -> Handler:
    """Before its answer, before, between and after its events, each time until heartbeats have gone out."""

    def handler(ex: Exchange) -> None:
        tap.wait_beats()
        ex.head(headers=llm.EVENTS)
        for event in events:
            tap.wait_beats()
            ex.send(event)
        if sdk.path == CHAT:
            ex.wait_gone()  # with [DONE] OpenAI's SDK leaves by itself, however long the stream stays open
        else:
            tap.wait_beats()
            ex.end()

    return handler


def gather(events: list[bytes], most: int = 2) -> list[bytes]:
    """The first events, each alone, and the others in one piece with the last alone: silences are slow."""
    return [*events[:most], b"".join(events[most:-1]), events[-1]]


@each_sdk_and_async
@pytest.mark.parametrize(("end", "ids"), [("\n", True), ("\r\n", False)], ids=["lf-ids", "crlf"])
def test_heartbeats_disturb_no_sdk(beating: Place, tapped: Tap, sdk: Sdk, end: str, ids: bool) -> None:
    """After an `id` field a blank line too many would kill OpenAI's."""
    beating.serve(sdk.path, falls_silent(tapped, sdk, gather(sdk.events(ids=ids, end=end))))
    sdk.listen(tapped.origin)
    assert len(beating.asked(sdk.path)) == 1


@each_sdk
def test_heartbeats_disturb_nobody_behind_nginx(beating_behind_nginx: Place, sdk: Sdk) -> None:
    with Tap(beating_behind_nginx.port) as tap:
        beating_behind_nginx.serve(sdk.path, falls_silent(tap, sdk, gather(sdk.events(ids=True, end="\r"))))
        sdk.listen(tap.origin)


@each_sdk
def test_heartbeats_keep_out_of_an_event(beating: Place, tapped: Tap, sdk: Sdk) -> None:
    """A silence inside an event stays one: another stream of the same relay's, silent as long, tells the time."""
    word = llm.WORDS[1].encode()
    events = sdk.events(ids=True)
    spoken = next(n for n, event in enumerate(events) if word in event)
    cut = events[spoken].index(word) + len(word)

    def handler(ex: Exchange) -> None:
        ex.head(headers=llm.EVENTS)
        ex.send(b"".join(events[:spoken]) + events[spoken][:cut])
        tapped.wait_for(word)
        before = tapped.count(BEAT)
        count_beats(beating, 4)
        assert tapped.count(BEAT) == before
        ex.send(events[spoken][cut:] + b"".join(events[spoken + 1 :]))
        ex.end()

    beating.serve(sdk.path, handler)
    sdk.listen(tapped.origin)


def count_beats(place: Place, beats: int) -> None:
    """Return after so many heartbeats on a stream of its own."""
    path = place.upstream.by_hand()
    with Connection(place.port) as connection:
        connection.send("GET", f"/v1{path}", {"Accept": "text/event-stream"})
        exchange = place.upstream.next(path)
        exchange.head(headers=llm.EVENTS)
        response = connection.read_head()
        for _ in range(beats):
            response.read_until(BEAT[1:])
        exchange.end()
        response.finish()


@each_sdk
def test_an_answer_in_one_piece_may_come_late(beating: Place, tapped: Tap, sdk: Sdk) -> None:
    """Neither the hold nor a heartbeat has any place in it."""

    def handler(ex: Exchange) -> None:
        body = sdk.answer()
        count_beats(beating, 5)
        ex.head(headers=llm.JSON, framing="length", length=len(body))
        ex.send(body[:40])
        count_beats(beating, 2)
        ex.send(body[40:])
        ex.end()

    beating.serve(sdk.path, handler)
    assert sdk.ask(tapped.origin) == llm.TEXT
    assert tapped.count(BEAT) == 0


@each_sdk
def test_a_refusal_within_the_hold_keeps_its_status(direct: Place, sdk: Sdk) -> None:
    """The shipped one, since a busy machine may take longer to refuse than the hold of the others here lasts."""
    direct.serve(sdk.path, answers(b"{}", 401))
    with pytest.raises(sdk.module.AuthenticationError):
        sdk.stream(direct.origin, [].append)


@each_sdk_and_async
def test_an_answer_after_the_hold_comes_whole(beating: Place, tapped: Tap, sdk: Sdk) -> None:
    def handler(ex: Exchange) -> None:
        tapped.wait_for(BEAT)
        streams(sdk.events())(ex)

    beating.serve(sdk.path, handler)
    sdk.listen(tapped.origin)
    assert len(beating.asked(sdk.path)) == 1


@each_sdk
@pytest.mark.parametrize(
    "late",
    [
        pytest.param(answers(llm.openai_error("no such key", "authentication_error", "x"), 401, reason="No"), id="401"),
        pytest.param(answers(b"{}", 429, ("Retry-After", "1"), reason="No"), id="429"),
        pytest.param(answers(llm.chat_answer(), 200), id="json"),
        pytest.param(stays_away, id="hang-up"),
        pytest.param(lambda ex: (ex.raw(b"nonsense\r\n\r\n"), ex.abort()), id="not-http"),
    ],
)
def test_a_failure_after_the_hold_is_an_error(beating: Place, tapped: Tap, sdk: Sdk, late: Handler) -> None:
    """And not asked for again: the SDK has its 200 by then."""

    def handler(ex: Exchange) -> None:
        tapped.wait_for(BEAT)
        late(ex)

    beating.serve(sdk.path, handler)
    assert sdk.fail(tapped.origin) in ("upstream_error", "x")  # its own code, if it has one
    assert len(beating.asked(sdk.path)) == 1


@each_company
def test_a_status_after_the_hold_is_named(beating: Place, tapped: Tap, sdk: Sdk) -> None:
    """What it was about is for people to read."""

    def handler(ex: Exchange) -> None:
        tapped.wait_for(BEAT)
        ex.reply(b"{}", 401, "Unauthorized", llm.JSON)

    beating.serve(sdk.path, handler)
    with pytest.raises(sdk.module.APIError, match="401 Unauthorized"):
        sdk.stream(tapped.origin, [].append)


def test_an_upstream_that_never_answers_after_the_hold() -> None:
    with relay(RELAY_HEARTBEAT="0.1", RELAY_HOLD="0.1", RELAY_FIRST_BYTE_TIMEOUT="0.4") as place:
        for sdk in SDKS.values():
            with Tap(place.port) as tap:
                for _ in range(TRIES):
                    place.serve(sdk.path, never_answers)
                    assert sdk.fail(tap.origin) == "first_byte_timeout"
                    place.asked_once(sdk.path)
                    if tap.count(BEAT) >= 1:
                        break
                else:
                    pytest.fail("no heartbeat before the end")
