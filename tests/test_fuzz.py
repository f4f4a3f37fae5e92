"""Hostile and random requests by the ten thousand against a real gunicorn, and slow ones by the hundred behind nginx.

The upstream answers 200 to everything and echoes what it got, so that whatever else comes back is the relay's own
doing. Requests are pipelined in batches; each valid one has a tag of its own, and its answer must have the same. The
generator is seeded: a failure names its seed, and TEST_SEED repeats it.
"""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from harness import DEADLINE, eventually, servers
from harness import SEED as GIVEN_SEED
from harness.client import Chunked, request
from harness.upstream import Exchange, Upstream

if TYPE_CHECKING:
    from harness.servers import Gunicorn

SEED = GIVEN_SEED or random.SystemRandom().randrange(1, 2**32)
REQUESTS = 25_000
AT_A_TIME = 24  # connections
#: Seconds after which the client says that nothing more comes: what waits for the rest of a request must end then.
PATIENCE = 0.15

TOKENS = b"!#$%&'*+-.^_`|~abcdefghijklmnopqrstuvwxyz0123456789"
PATH = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~!$&'()*+,;=:@"
HOSTILE_BYTES = [
    b"\0",
    b"\r",
    b"\n",
    b"\r\n",
    b"\t",
    b" ",
    b"\x0b",
    b"\x0c",
    b"\x7f",
    b"\x80",
    b"\xff",
    b":",
    b"%",
    b"#",
]


@dataclass
class Sent:
    """One request on the wire. `tag`: a valid one's, which its answer must echo; None: anything but harm may come."""

    data: bytes
    tag: bytes | None = None
    body: bytes = b""


@dataclass
class Answer:
    status: int
    headers: dict[bytes, bytes]
    body: bytes


@dataclass
class Talk:
    """What was sent on a connection, and what came back."""

    sent: list[Sent]
    received: bytes = b""
    hung: bool = False
    answers: list[Answer] = field(default_factory=list)


class Generator:
    """Requests from a seed: valid ones with a tag, and hostile ones of every kind that has fooled a parser."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.count = 0

    def bytes_of(self, alphabet: bytes, least: int, most: int) -> bytes:
        return bytes(self.random.choices(alphabet, k=self.random.randint(least, most)))

    def noise(self, most: int) -> bytes:
        return self.random.randbytes(self.random.randint(0, most))

    def new_tag(self) -> bytes:
        self.count += 1
        return b"t%d-%d." % (self.seed, self.count)

    def valid(self, *, close: bool = False, inside: bytes = b"/v1/inside") -> Sent:
        """A request that must be answered, in any of the forms that HTTP has for one. `inside`: a path in its body."""
        pick = self.random
        tag = self.new_tag()
        method = pick.choice([b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"])
        target = b"/v1/" + b"/".join(self.bytes_of(PATH, 1, 9) for _ in range(pick.randint(1, 4)))
        target = re.sub(rb"(?<=/)\.{1,2}(?=[/;]|$)", b"x", target)  # dot segments are refused
        if pick.random() < 0.4:
            target += b"?" + self.bytes_of(PATH + b"/?%", 0, 40)
        headers = [b"Host: localhost", b"X-Tag: " + tag]
        # Letters first and last: no name that means something to anybody.
        names = [b"Zz" + self.bytes_of(TOKENS.replace(b"_", b""), 1, 12) + b"z" for _ in range(pick.randint(0, 4))]
        headers += [name + b": " + self.bytes_of(PATH, 0, 30) for name in names]
        body = b""
        if method in (b"POST", b"PUT", b"PATCH") or pick.random() < 0.1:
            # A body that is itself a request: whoever loses count would take it for one.
            body = pick.choice([self.noise(200), b"GET " + inside + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"])
        if body and pick.random() < 0.4:
            headers.append(b"Transfer-Encoding: " + pick.choice([b"chunked", b"Chunked", b"CHUNKED"]))
            framed = self.chunked(body)
        else:
            if body or method != b"GET":
                headers.append(b"Content-Length: %d" % len(body))
            framed = body
        if close:
            headers.append(b"Connection: close")
        pick.shuffle(headers)
        head = b"%b %b HTTP/1.1\r\n%b\r\n\r\n" % (method, target, b"\r\n".join(headers))
        return Sent(head + framed, tag, body)

    def chunked(self, body: bytes) -> bytes:
        framed = b""
        while body:
            size = self.random.randint(1, len(body))
            extension = self.random.choice([b"", b"", b";a", b';a="b"'])
            framed += b"%x%b\r\n%b\r\n" % (size, extension, body[:size])
            body = body[size:]
        return framed + b"0\r\n\r\n"

    def hostile(self) -> Sent:
        kinds = (
            self.random_bytes,
            self.mutated,
            self.mutated,
            self.bad_line,
            self.bad_header,
            self.bad_header,
            self.bad_framing,
            self.bad_framing,
            self.bad_chunks,
            self.bad_target,
            self.bad_target,
        )
        return Sent(self.random.choice(kinds)())

    def random_bytes(self) -> bytes:
        return self.noise(300) + self.random.choice([b"", b"\r\n\r\n", b"\n\n"])

    def mutated(self) -> bytes:
        """A valid request in which bytes were lost, doubled, put in or changed."""
        data = bytearray(self.valid(inside=b"/v1/perhaps").data)
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(data) or 1)
            what = self.random.randrange(4)
            if what == 0:
                del data[at : at + self.random.randint(1, 8)]
            elif what == 1:
                data[at:at] = self.random.choice(HOSTILE_BYTES)
            elif what == 2:
                data[at : at + 1] = self.random.randbytes(1)
            else:
                data[at:at] = data[at : at + self.random.randint(1, 20)]
        return bytes(data)

    def bad_line(self) -> bytes:
        pick = self.random
        host = b"\r\nHost: localhost\r\n\r\n"
        return pick.choice([
            lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            lambda: b"GET /v1/x" + host,
            lambda: b"GET  /v1/x HTTP/1.1" + host,
            lambda: b"GET\t/v1/x\tHTTP/1.1" + host,
            lambda: b" GET /v1/x HTTP/1.1" + host,
            lambda: b"GET /v1/x HTTP/1.1 " + host,
            lambda: b"GET /v1/x HTTP/" + pick.choice([b"1.2", b"9", b"0.9", b"1.", b"1.10", b"-1.1", b"3.0"]) + host,
            lambda: b"GET /v1/x http/1.1" + host,
            lambda: self.bytes_of(TOKENS, 1, 40) + b" /v1/x HTTP/1.1" + host,
            lambda: self.noise(30) + b" /v1/x HTTP/1.1" + host,
            lambda: b"GET /v1/" + b"a" * pick.choice([8100, 8190, 9000, 20_000]) + b" HTTP/1.1" + host,
            lambda: pick.choice([b"CONNECT", b"TRACE", b"TRACK"]) + b" /v1/x HTTP/1.1" + host,
            lambda: b"\r\n" * pick.randint(1, 50) + b"GET /v1/x HTTP/1.1" + host,
            lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + self.noise(200),
        ])()  # fmt: skip

    def bad_header(self) -> bytes:
        pick = self.random
        bad = pick.choice([
            lambda: b"No-Colon",
            lambda: b": no name",
            lambda: b"Space : x",
            lambda: b" Folded: x",
            lambda: b"X-A: b\r\n folded",
            lambda: b"X-A: b" + pick.choice(HOSTILE_BYTES) + b"c",
            lambda: b"X" + pick.choice(HOSTILE_BYTES) + b"A: b",
            lambda: b"X-A: " + b"h" * pick.choice([16_000, 16_380, 17_000, 70_000]),
            lambda: b"\r\n".join(b"X-%d: y" % n for n in range(pick.choice([90, 101, 300]))),
            lambda: b"Host: " + pick.choice([b"evil.example", b"", b"a b", b"[::1", b"localhost:99999", b"\xff",
                b"a,b"]),
            lambda: b"Connection: " + pick.choice([b"X-Tag", b"Host", b"close, keep-alive", b"Content-Length",
                b",,,", b"\xff"]),
            lambda: b"Expect: " + pick.choice([b"200-ok", b"100-continue", b"", b"\xff"]),
            lambda: b"Upgrade: " + pick.choice([b"websocket", b"h2c", b"\xff"]) + b"\r\nConnection: upgrade",
            lambda: b"X-Request-ID: " + self.noise(30).replace(b"\r", b"").replace(b"\n", b""),
            lambda: b"X_Tag: forged\r\nX-Forwarded-For: " + self.noise(12).replace(b"\n", b"").replace(b"\r", b""),
            lambda: b"Origin: " + pick.choice([b"null", b"http://[", b"https://evil.example", b"\xff", b"http://a:b"]),
            lambda: b"Accept: text/event-stream" + self.noise(6).replace(b"\n", b"").replace(b"\r", b""),
            lambda: b"Authorization: " + self.bytes_of(bytes(range(0x21, 0x7F)), 0, 60) + b"\r\nCookie: =;=;" + b"\xe9",
            lambda: self.bytes_of(TOKENS, 1, 20) + b": " + bytes(pick.choices(range(0x20, 0x100), k=30)),
        ])()  # fmt: skip
        return b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\n" + bad + b"\r\n\r\n"

    def bad_framing(self) -> bytes:
        pick = self.random
        smuggled = b"GET /v1/smuggled/%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % self.count
        length = pick.choice(
            [b"+5", b"-1", b"0x10", b"5,5", b"5, 6", b" ", b"", b"1_0", b"5 5", b"\xb2", b"9" * 30, b"33554433",
            b"05", b"5\0",
             b"1e3", b"5;x", b"99999", b"0"]
        )  # fmt: skip
        coding = pick.choice(
            [b"gzip", b"identity", b"chunked, chunked", b"chunked,", b"x, chunked", b"chunked\x0b", b"\x0bchunked",
             b"chunked;q=1", b"xchunked", b"chunked, identity", b"", b"\"chunked\"", b"gzip, chunked", b"chunked\0"]
        )  # fmt: skip
        framing = pick.choice([
            b"Content-Length: " + length,
            b"Content-Length: 5\r\nContent-Length: " + length,
            b"Content-Length: " + length + b"\r\nTransfer-Encoding: chunked",
            b"Transfer-Encoding: " + coding,
            b"Transfer-Encoding: " + coding + b"\r\nContent-Length: 5",
            b"Transfer-Encoding: chunked\r\nTransfer-Encoding: " + coding,
            b"Transfer-Encoding : chunked",
            b"Transfer-Encoding:\r\n chunked",
            b"Transfer_Encoding: chunked\r\nContent-Length: 5",
            b"Content_Length: 0\r\nContent-Length: 5",
            b"Content-Length : 5",
            b"Content-Length: 5\r\nConnection: Content-Length",
        ])  # fmt: skip
        body = pick.choice([b"", b"hello", b"0\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n"])
        version = pick.choice([b"1.1", b"1.1", b"1.1", b"1.0"])
        return b"POST /v1/x HTTP/%b\r\nHost: localhost\r\n%b\r\n\r\n%b%b" % (version, framing, body, smuggled)

    def bad_chunks(self) -> bytes:
        pick = self.random
        chunks = pick.choice([
            b"0x5\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"+5\r\nhello\r\n0\r\n\r\n",
            b"\r\nhello\r\n0\r\n\r\n",
            b"5 \r\nhello\r\n0\r\n\r\n", b"5\nhello\n0\n\n", b"5\r\nhello0\r\n\r\n", b"5\r\nhelloXX0\r\n\r\n", b"g\r\n",
            b"5;" + b"e" * pick.choice([10, 5000, 70_000]) + b"\r\nhello\r\n0\r\n\r\n",
            b"0" * 40 + b"5\r\nhello\r\n0\r\n\r\n",
            b"f" * pick.choice([8, 17, 400]) + b"\r\nhello", b"5\r\nhel", b"5\r\nhello\r\n", b"0\r\n",
            b"1_0\r\n" + b"a" * 16,
            b"5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n", b"5\r\nhello\r\n0\r\nno colon\r\n\r\n",
            b"0\r\n" + b"T: x\r\n" * 300,
            b"5\r\nhello\r\n0\r\nHost: evil\r\nX-Tag: forged\r\n\r\n", b"5;\0\r\nhello\r\n0\r\n\r\n",
            b"5;a\rb\r\nhello\r\n0\r\n\r\n",
            self.noise(60),
        ])  # fmt: skip
        return b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks

    def bad_target(self) -> bytes:
        pick = self.random
        target = pick.choice([
            lambda: pick.choice([b"*", b"//", b"/", b"?", b"/v1", b"/v1?", b"/v1//", b"/v1/\\..\\x", b"x", b"#",
                b"v1/x"]),
            lambda: b"/v1/" + b"/".join(pick.choices([b"..", b".", b"%2e%2e", b"%2E.", b"a", b"", b"%2f",
                b"%5c"], k=5)),
            lambda: b"/v1/" + pick.choice([b"%", b"%0", b"%zz", b"%00", b"%0d%0a", b"%ff", b"%c0%ae", b"%u0041",
                b"%25%32%65"]),
            lambda: b"http://evil.example/v1/x",
            lambda: b"http://" + self.bytes_of(PATH + b"[]@:/?#", 0, 20),
            lambda: b"evil.example:443",
            lambda: b"/v1/" + bytes(pick.choices(range(0x21, 0x100), k=pick.randint(1, 40))),
            lambda: b"/v1/x?" + bytes(pick.choices(range(0x21, 0x100), k=pick.randint(1, 200))),
            lambda: b"/v1/x" + b"/a" * pick.choice([100, 2000]),
            lambda: b"/v1/x?" + b"&".join([b"a=b"] * pick.choice([100, 1500])),
            lambda: b"/v1/x#" + self.bytes_of(PATH, 0, 20),
            lambda: b"/v1/_relay/" + self.bytes_of(PATH + b"/", 0, 12),
            lambda: pick.choice([b"/health", b"/metrics", b"/streams", b"/health/live", b"/ticket", b"/chat/stream"])
            + self.bytes_of(PATH + b"/?", 0, 6),
        ])()  # fmt: skip
        method = pick.choice([b"GET", b"GET", b"POST", b"DELETE", b"OPTIONS"])
        length = b"" if method == b"GET" else b"Content-Length: 0\r\n"
        return b"%b %b HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % (method, target, length)

    def batch(self) -> list[Sent]:
        """What goes out on one connection: some valid ones, one that is not, and one to see who has lost count."""
        before = [self.valid() for _ in range(self.random.randint(1, 4))]
        if self.random.random() < 0.2:
            return [*before, self.valid(close=True)]
        return [*before, self.hostile(), Sent(self.valid(close=True, inside=b"/v1/perhaps").data)]


def echo(ex: Exchange) -> None:
    """200 to everything, with the request's own tag and the length of its body."""
    tag = ex.header("X-Tag") or b"-"
    ex.reply(b"%b %d" % (tag, len(ex.body)), headers=[("X-Tag", tag), ("Content-Type", "text/plain")])


def converse(port: int, talk: Talk) -> Talk:
    """Send it all, read until the server closes; after a silence, say that no more comes."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as sock, contextlib.suppress(ConnectionError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        valid = b"".join(each.data for each in talk.sent[:-2])
        sock.sendall(valid)
        sock.sendall(b"".join(each.data for each in talk.sent[-2:]))
        sock.settimeout(PATIENCE)
        waiting_since = time.monotonic()
        answered = sum(each.tag is not None for each in talk.sent)
        silent = False
        while True:
            try:
                data = sock.recv(262_144)
            except TimeoutError:
                # Valid requests that were not answered yet keep it patient: the machine may be busy.
                if not silent and answers_so_far(talk) >= answered:
                    silent = True
                    sock.shutdown(socket.SHUT_WR)
                elif time.monotonic() - waiting_since > DEADLINE:
                    talk.hung = True
                    break
                continue
            if not data:
                break
            talk.received += data
            waiting_since = time.monotonic()
    return talk


def answers_so_far(talk: Talk) -> int:
    """How many have come whole: after the last head its body may be on its way still."""
    so_far = Talk(talk.sent, talk.received)
    with contextlib.suppress(AssertionError):  # half a head; what is none at all is told at the end
        parse(so_far)
    return sum(answer.status == 200 for answer in so_far.answers)


def parse(talk: Talk) -> None:
    """The answers, strictly; raises AssertionError for what is not HTTP."""
    rest = talk.received
    while rest:
        head, blank, rest = rest.partition(b"\r\n\r\n")
        status_line, *lines = head.split(b"\r\n")
        match = re.fullmatch(rb"HTTP/1\.[01] (\d{3}) [\x20-\x7e]*", status_line)
        assert match, f"a status line {status_line!r}"
        if not blank:
            return  # cut by the server's reset, which discards what is on the way
        status = int(match[1])
        if status == 100:
            continue
        headers: dict[bytes, bytes] = {}
        for line in lines:
            pair = re.fullmatch(rb"([A-Za-z0-9-]+): ([\t\x20-\x7e\x80-\xff]*)", line)
            assert pair, f"a header {line!r}"
            headers[pair[1].lower()] = pair[2]
        if headers.get(b"transfer-encoding") == b"chunked":
            body, decoder = bytearray(), Chunked()
            used = decoder.decode(bytearray(rest), body)
            whole = decoder.done
        else:
            used = int(headers.get(b"content-length", b"0"))
            body = bytearray(rest[:used])
            whole = len(rest) >= used
        if not whole:
            return
        rest = rest[used:]
        talk.answers.append(Answer(status, headers, bytes(body)))


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[tuple[Upstream, Gunicorn]]:
    with Upstream(echo) as upstream:
        env = {"RELAY_UPSTREAM_URL": upstream.base_url, "WEB_CONCURRENCY": "2", "RELAY_HOLD": "5s"}
        with servers.gunicorn(env) as relay:
            yield upstream, relay


def judge(talk: Talk, statuses: Counter[int]) -> None:
    """What must hold of a connection, whatever was sent on it."""
    context = f"TEST_SEED={SEED}, the request that is none: {talk.sent[-2].data[:600]!r}"
    assert not talk.hung, f"no end within {DEADLINE:g} s: {context}"
    parse(talk)
    assert len(talk.answers) <= len(talk.sent) + 2, context  # what is hostile may hold a second and a third request
    valid = [each for each in talk.sent if each.tag is not None]
    assert len(talk.answers) >= len(valid), f"{len(talk.answers)} answers to {len(valid)} requests: {context}"
    for sent, answer in zip(valid, talk.answers, strict=False):
        assert answer.status == 200, f"{answer} to {sent.data[:600]!r}"
        assert answer.headers[b"x-tag"] == sent.tag, f"another's answer: {answer} to {sent.data[:600]!r}"
        assert answer.body == b"%b %d" % (sent.tag, len(sent.body)), f"{answer} to {sent.data[:600]!r}"
    mine = b"".join(each.data for each in talk.sent)
    for answer in talk.answers:
        statuses[answer.status] += 1
        if answer.status == 200:
            # Health says what it says; everything else is the echo of something in this connection.
            tags = re.split(rb",\s*", answer.headers.get(b"x-tag", b"-"))  # WSGI joins what is repeated
            foreign = [tag for tag in tags if tag != b"-" and tag not in mine]
            assert not foreign, f"another connection's answer: {answer}; {context}"
        # 501 is the answer to a transfer coding that a server does not know (RFC 9112 section 6.1).
        server_error = answer.status >= 500 and not (answer.status == 501 and b"ransfer" in mine)
        assert not server_error, f"{answer}; {context}"


def check_framing(upstream: Upstream, talks: list[Talk]) -> None:
    """What stood behind a request of doubtful length was taken for a request only where there was no doubt."""
    framed_by = {}
    for talk in talks:
        for path in re.findall(rb"/v1(/smuggled/\d+) ", talk.sent[-2].data):
            framed_by[path.decode()] = talk.sent[-2].data.partition(b"\r\n\r\n")[0]
    assert len(framed_by) > 100
    paths = {ex.path for ex in upstream.seen()}
    assert "/inside" not in paths, f"TEST_SEED={SEED}: a valid request's body was taken for a request"
    for path in paths & set(framed_by):
        head = framed_by[path]
        lengths = re.findall(rb"(?m)^Content-Length: (.*)\r?$", head)
        sure = len(lengths) == 1 and re.fullmatch(rb"0*[05]\r?", lengths[0]) and b"Transfer-Encoding" not in head
        assert sure, f"TEST_SEED={SEED}: {head!r} was followed by another request"


@pytest.mark.slow
@pytest.mark.watchdog(400)  # it computes: 11 s with two cores of its own, 140 s on a machine in full use
def test_hostile_requests_by_the_ten_thousand_do_no_harm(fuzzed: tuple[Upstream, Gunicorn]) -> None:
    upstream, relay = fuzzed
    workers = relay.workers()
    generator = Generator(SEED)
    talks: list[Talk] = []
    while sum(len(talk.sent) for talk in talks) < REQUESTS:
        talks.append(Talk(generator.batch()))
    statuses: Counter[int] = Counter()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for talk in pool.map(lambda talk: converse(relay.port, talk), talks):
            judge(talk, statuses)
    # Nothing has crashed, nothing is left open, and nothing of a body was taken for a request.
    assert relay.workers() == workers
    relay.check()
    upstream.check()
    assert request(relay.port, "GET", "/v1/models", {"X-Tag": "after"}).header("X-Tag") == b"after"

    def open_streams() -> list[float]:
        metrics = request(relay.admin_port, "GET", "/metrics").finish().data.decode()
        return [float(n) for n in re.findall(r"^relay_open_streams\{.*\} (\S+)", metrics, re.MULTILINE)]

    eventually(lambda: open_streams() == [0.0], "no stream left open")
    assert statuses[200] > REQUESTS // 2
    assert sum(statuses[status] for status in (400, 403, 404, 405, 413, 414, 431, 501)) > 500
    check_framing(upstream, talks)
    print(f"seed {SEED}: {sum(len(talk.sent) for talk in talks)} requests, answers {dict(sorted(statuses.items()))}")


# --- Slow ones


@contextlib.contextmanager
def slow(port: int, heads: int, bodies: int) -> Iterator[list[socket.socket]]:
    """So many clients that never get to the end of a head or a body, each a few bytes at a time, from 127.0.0.2."""
    stop = threading.Event()
    sockets: list[socket.socket] = []
    begin = [b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"] * heads
    begin += [b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"] * bodies

    def dribble() -> None:
        while not stop.wait(0.5):
            for number, sock in enumerate(sockets):
                with contextlib.suppress(OSError):  # the server has had enough of it
                    sock.send(b"X-a: b\r\n" if number < heads else b"xx")

    thread = threading.Thread(target=dribble)
    try:
        for data in begin:
            sock = socket.create_connection(("127.0.0.1", port), DEADLINE, ("127.0.0.2", 0))
            sockets.append(sock)
            sock.sendall(data)
        thread.start()
        yield sockets
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()
        for sock in sockets:
            sock.close()


def closed(sockets: list[socket.socket]) -> int:
    """How many of them the server has closed or answered."""
    count = 0
    for sock in sockets:
        sock.setblocking(False)
        try:
            sock.recv(1, socket.MSG_PEEK)
            count += 1
        except BlockingIOError:
            pass
        except OSError:
            count += 1
    return count


@pytest.mark.slow
def test_slow_heads_and_bodies_by_the_hundred_do_not_stop_others(fuzzed: tuple[Upstream, Gunicorn]) -> None:
    """Behind the shipped nginx, its clock for heads shortened so that the test sees it strike."""
    _, relay = fuzzed
    clock = {"client_header_timeout 15s": "client_header_timeout 3s"}
    with servers.nginx(relay.port, relay.admin_port, replace=clock) as proxy, slow(proxy.port, 500, 500) as sockets:
        took = []
        for number in range(200):
            began = time.monotonic()
            tag = f"n{number}"
            response = request(proxy.port, "POST", "/v1/chat/completions", {"X-Tag": tag}, b'{"stream": true}')
            assert response.status == 200
            assert response.header("X-Tag") == tag.encode()
            took.append(time.monotonic() - began)
        # Whoever must wait for a slow one waits for 3 s. Some may have waited for the processor.
        assert sorted(took)[-20] < 1, f"the slowest of 200: {sorted(took)[-20:]}"
        assert request(proxy.port, "GET", "/health/live").status == 200
        eventually(lambda: closed(sockets[:500]) == 500, "the end of slow heads")
        assert closed(sockets[500:]) == 0  # they do send


@pytest.mark.slow
def test_an_address_can_hold_only_so_many_slow_bodies(fuzzed: tuple[Upstream, Gunicorn]) -> None:
    """With the limit of nginx-tls.conf."""
    _, relay = fuzzed
    extra: dict[str, str] = {"extra_http": "include snippets/relay-limits.conf;"}
    with (
        servers.nginx(relay.port, relay.admin_port, "limit_conn relay_address 100;", **extra) as proxy,
        slow(proxy.port, 0, 300) as sockets,
    ):
        eventually(lambda: closed(sockets) == 200, "the refusal of what is beyond the limit")
        assert _all_refused(sockets)
        assert request(proxy.port, "POST", "/v1/x", {"X-Tag": "another"}, b"{}").header("X-Tag") == b"another"


def _all_refused(sockets: list[socket.socket]) -> bool:
    answers = []
    for sock in sockets:
        with contextlib.suppress(BlockingIOError):
            answers.append(sock.recv(20))
    return all(answer.startswith(b"HTTP/1.1 429") for answer in answers)
