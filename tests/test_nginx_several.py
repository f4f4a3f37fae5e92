"""The shipped nginx in front of several relays: one that is not there costs no request, and none is sent twice.

For the relays stand scripted servers: what matters is which of them gets which request, how often, and in which bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from harness import DEADLINE, REPO, eventually, servers
from harness.client import Connection, request
from harness.upstream import Upstream, deaf

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from harness.client import Response
    from harness.servers import Nginx
    from harness.upstream import Exchange

EVENTS = [("Content-Type", "text/event-stream")]
CONNECT = 2.0  # seconds: the shipped proxy_connect_timeout
SOON = 0.5  # seconds more that a busy machine may take

#: The ways of relay-several.conf, each with a body and without one.
ALL = [
    pytest.param("POST", b"{}", id="POST"),
    pytest.param("POST", b"", id="POST-empty"),
    pytest.param("PATCH", b"{}", id="PATCH"),
    pytest.param("GET", b"", id="GET"),
    pytest.param("GET", b"{}", id="GET-body"),
    pytest.param("HEAD", b"", id="HEAD"),
    pytest.param("OPTIONS", b"", id="OPTIONS"),
    pytest.param("PUT", b"{}", id="PUT"),
    pytest.param("DELETE", b"", id="DELETE"),
]
#: Those that go on to another relay if one is not there.
MOVED = [param for param in ALL if param.id in ("POST", "POST-empty", "PATCH", "GET", "HEAD", "OPTIONS")]


@contextlib.contextmanager
def behind(*ports: int, replace: Mapping[str, str] | None = None, extra: str = "") -> Iterator[Nginx]:
    """nginx with a `server` line for each of these ports."""
    first, *others = (f"server 127.0.0.1:{port} max_fails=1 fail_timeout=5s;" for port in ports)
    several = {first: "\n    ".join([first, *others])}
    with servers.nginx(ports[0], servers.free_port(), extra, replace={**several, **(replace or {})}) as proxy:
        yield proxy


@contextlib.contextmanager
def refusing() -> Iterator[int]:
    """A port that refuses connections, and that nobody else can take meanwhile."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def refuses(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def answers(ex: Exchange) -> None:
    framing = "none" if ex.method == b"HEAD" else "length"
    ex.reply(b'{"whole": true}', headers=[("Content-Type", "application/json")], framing=framing)


def hangs_up(ex: Exchange) -> None:
    """The request is read, so it may be under way somewhere."""
    ex.abort()


class Answer(NamedTuple):
    status: int
    body: bytes
    seconds: float


def ask(port: int, method: str, target: str = "/v1/x", body: bytes = b"") -> Answer:
    began = time.monotonic()
    response = request(port, method, target, body=body)
    data = response.finish().data
    return Answer(response.status, data, time.monotonic() - began)


def total(relays: list[Upstream]) -> int:
    return sum(len(relay.seen()) for relay in relays)


def failed(response: Response, status: int, code: str, should_retry: bytes | None) -> None:
    """It is an error of nginx's own, as relay-errors.conf has it."""
    assert (response.status, response.header("x-should-retry")) == (status, should_retry)
    assert response.header("Content-Type") == b"application/json"
    if response.framing != "none":
        assert json.loads(response.finish().data)["error"]["code"] == code


# --- A relay that is not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "body"), MOVED)
def test_a_refused_and_an_unanswered_connection_go_on_to_the_next_relay(method: str, body: bytes) -> None:
    """Of three one refuses and one never accepts: 30 requests are answered, and only the first has to wait for it."""
    with (
        Upstream(answers) as relay,
        deaf() as unanswered,
        refusing() as refused,
        behind(unanswered, refused, relay.port) as proxy,
    ):
        first, *others = (ask(proxy.port, method, body=body) for _ in range(30))
        assert {answer.status for answer in (first, *others)} == {200}
        assert len(relay.seen()) == 30
        assert all(ex.body == body for ex in relay.seen())
        assert first.seconds < CONNECT + 5 * SOON
        assert max(answer.seconds for answer in others) < CONNECT + SOON, "one in 5 s tries it again"


def test_a_body_that_comes_in_pieces_goes_to_the_next_relay_whole() -> None:
    pieces = [b"%07d " % n * 4096 for n in range(64)]  # 2 MiB
    with Upstream(answers) as relay, deaf() as unanswered, behind(unanswered, relay.port) as proxy:
        for _ in range(2):
            response = request(proxy.port, "POST", "/v1/x", body=pieces)
            assert response.finish().data == b'{"whole": true}'
        assert [ex.body == b"".join(pieces) for ex in relay.seen()] == [True, True]


@pytest.mark.parametrize(
    ("method", "body"), [pytest.param("POST", b"{}", id="POST"), pytest.param("GET", b"", id="GET")]
)
def test_a_connection_that_is_refused_only_after_a_while_goes_on_too(method: str, body: bytes) -> None:
    """As by another host, whose refusal needs time to arrive."""
    with Upstream(answers) as relay, contextlib.ExitStack() as stack:
        late = stack.enter_context(deaf())
        with behind(late, relay.port) as proxy, Connection(proxy.port) as connection:
            connection.send(method, "/v1/x", body=body)
            eventually(lambda: connecting(late), "nginx connects")
            stack.close()  # the kernel asks once more after 1 s, and is refused
            response = connection.read_head()
            assert (response.status, len(relay.seen())) == (200, 1)
            response.finish()
            proxy.wait_log('"path":"/v1/x"')
            (line,) = (line for line in proxy.log().splitlines() if '"path":"/v1/x"' in line)
            assert re.split(" : |, ", json.loads(line)["upstream_status"]) == ["502", "200"], "refused, not late"


def connecting(port: int) -> bool:
    """Whether a connection to this port waits for the answer to its SYN."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(int(remote.partition(":")[2], 16) == port and state == "02" for _, _, remote, state, *_ in lines)


def test_a_relay_that_is_back_gets_requests_again() -> None:
    quick = {"fail_timeout=5s": "fail_timeout=1s"}
    with (
        socket.socket() as back,
        Upstream(answers) as other,
        contextlib.ExitStack() as stack,
    ):
        back.bind(("127.0.0.1", 0))
        proxy = stack.enter_context(behind(back.getsockname()[1], other.port, replace=quick))
        assert ask(proxy.port, "GET").status == 200
        back.listen()

        def gets_one() -> bool:
            connection = stack.enter_context(Connection(proxy.port))
            connection.send("GET", "/v1/x")
            found, _, _ = select.select([connection, back], [], [], DEADLINE)
            return back in found

        eventually(gets_one, "a request for the relay that is back", every=0.05)


@pytest.mark.parametrize(("method", "body"), ALL)
def test_if_no_relay_is_there_the_client_may_ask_again(method: str, body: bytes) -> None:
    with refusing() as a, refusing() as b, refusing() as c, behind(a, b, c) as proxy:
        for _ in range(3):  # the second finds them left out
            failed(request(proxy.port, method, "/v1/x", body=body), 502, "relay_unreachable", b"true")


@pytest.mark.parametrize(("method", "body"), ALL)
def test_if_no_relay_accepts_it_is_late_and_the_client_may_ask_again(method: str, body: bytes) -> None:
    quick = {f"proxy_connect_timeout {CONNECT:g}s;\n": "proxy_connect_timeout 200ms;\n"}
    with deaf() as a, deaf() as b, behind(a, b, replace=quick) as proxy:
        response = request(proxy.port, method, "/v1/x", body=body)
        assert response.header("x-should-retry") == b"true"
        assert response.status in (502, 504)  # 502: nginx has found that none is left


def test_a_relay_that_dies_costs_nobody_a_request() -> None:
    """With real relays: what is asked for after its end comes from the other, and reaches the upstream once."""

    def brief(ex: Exchange) -> None:
        ex.reply(b"data: 1\n\n", headers=EVENTS)

    with Upstream(brief) as upstream, contextlib.ExitStack() as stack:
        env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_ALLOW": "*"}
        dead, alive = (stack.enter_context(servers.gunicorn(env)) for _ in range(2))
        proxy = stack.enter_context(behind(dead.port, alive.port))
        for method in ("POST", "GET"):
            ask(proxy.port, method)
        os.killpg(dead.pid, signal.SIGKILL)
        eventually(lambda: refuses(dead.port), "its port is closed")
        before = len(upstream.seen("/x"))
        for method in ("GET", "POST") * 30:
            answer = ask(proxy.port, method)
            assert (answer.status, answer.body) == (200, b"data: 1\n\n")
        assert len(upstream.seen("/x")) - before == 60


# --- A request that was sent ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "body"), ALL)
def test_what_was_sent_is_not_sent_again(method: str, body: bytes) -> None:
    """Neither if the relay that has it hangs up, nor after another that was not there."""
    with contextlib.ExitStack() as stack:
        relays = [stack.enter_context(Upstream(hangs_up)) for _ in range(3)]
        with behind(*(relay.port for relay in relays)) as proxy:
            for n in (1, 2, 3):
                failed(request(proxy.port, method, "/v1/x", body=body), 502, "relay_unreachable", b"false")
                assert total(relays) == n


@pytest.mark.parametrize(("method", "body"), MOVED)
def test_what_was_sent_to_the_second_is_not_sent_to_a_third(method: str, body: bytes) -> None:
    with contextlib.ExitStack() as stack:
        refused = stack.enter_context(refusing())
        relays = [stack.enter_context(Upstream(hangs_up)) for _ in range(3)]
        with behind(refused, *(relay.port for relay in relays)) as proxy:
            failed(request(proxy.port, method, "/v1/x", body=body), 502, "relay_unreachable", b"false")
            assert total(relays) == 1


@pytest.mark.parametrize(("method", "body"), [param for param in ALL if param not in MOVED])
def test_what_nginx_cannot_send_once_only_stays_with_one_relay(method: str, body: bytes) -> None:
    """The client may ask again, which goes to a relay that is there."""
    with refusing() as refused, Upstream(answers) as relay, behind(refused, relay.port) as proxy:
        failed(request(proxy.port, method, "/v1/x", body=body), 502, "relay_unreachable", b"true")
        assert ask(proxy.port, method, body=body).status == 200


@pytest.mark.parametrize(("method", "body"), ALL)
def test_an_answer_that_is_late_is_not_asked_for_again(method: str, body: bytes) -> None:
    impatient = {"proxy_read_timeout 660s": "proxy_read_timeout 300ms"}

    def silent(ex: Exchange) -> None:
        ex.wait_gone()

    with contextlib.ExitStack() as stack:
        relays = [stack.enter_context(Upstream(silent)) for _ in range(2)]
        with behind(*(relay.port for relay in relays), replace=impatient) as proxy:
            failed(request(proxy.port, method, "/v1/x", body=body), 504, "relay_timeout", b"false")
            assert total(relays) == 1


def test_a_cut_is_not_filled_up_by_another_relay() -> None:
    def cut(ex: Exchange) -> None:
        ex.head(headers=EVENTS)
        ex.send(b"data: 1\n\n")
        ex.abort()

    with contextlib.ExitStack() as stack:
        relays = [stack.enter_context(Upstream(cut)) for _ in range(2)]
        with behind(*(relay.port for relay in relays)) as proxy:
            body = request(proxy.port, "GET", "/v1/x").finish()
            assert (body.data, body.ended) == (b"data: 1\n\n", "cut")
            assert total(relays) == 1


# --- All are there --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_stream_goes_to_the_relay_with_the_fewest(method: str) -> None:
    with contextlib.ExitStack() as stack:
        relays = [stack.enter_context(Upstream()) for _ in range(3)]
        for relay in relays:
            relay.by_hand("/v1/x")
        proxy = stack.enter_context(behind(*(relay.port for relay in relays)))
        for n in range(1, 13):
            connection = stack.enter_context(Connection(proxy.port))
            connection.send(method, "/v1/x")
            eventually(lambda n=n: total(relays) == n, "the stream has begun")  # type: ignore[misc]
        assert [len(relay.seen()) for relay in relays] == [4, 4, 4]


TARGETS = ["//", "/a//b/", "/a%2Fb%2fc", "/a;b=c;d", "/%7e~/%3F?a=%20&&b=c?d=/e", "/a%23b", "/%0A", "/a?", "/./b/../c"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("method", "gone"),
    [("POST", False), ("GET", False), ("PUT", False), ("POST", True), ("GET", True)],
    ids=["POST", "GET", "PUT", "POST-to-the-next", "GET-to-the-next"],
)
def test_a_path_arrives_as_it_was_sent(method: str, gone: bool, target: str) -> None:
    with Upstream(answers) as relay, refusing() as refused:
        with behind(*([refused] if gone else []), relay.port) as proxy:
            assert ask(proxy.port, method, target).status == 200
        assert [ex.target for ex in relay.seen()] == [target.encode()]


@pytest.mark.parametrize(("method", "body"), ALL)
@pytest.mark.parametrize("status", [418, 502, 504])
def test_a_relays_own_error_is_passed_on(method: str, body: bytes, status: int) -> None:
    def fails(ex: Exchange) -> None:
        ex.reply(b"its own", status, "Its Own", framing="none" if ex.method == b"HEAD" else "length")

    with Upstream(fails) as one, Upstream(fails) as other, behind(one.port, other.port) as proxy:
        response = request(proxy.port, method, "/v1/x", body=body)
        assert (response.status, response.header("x-should-retry")) == (status, None)
        assert response.finish().data == (b"" if method == "HEAD" else b"its own")
        assert total([one, other]) == 1


@pytest.mark.parametrize(("method", "body"), ALL)
def test_an_error_in_which_no_relay_is_involved_does_not_say_whether_to_ask_again(method: str, body: bytes) -> None:
    small = {"client_max_body_size 32m": "client_max_body_size 1k"}
    with Upstream(answers) as relay, behind(relay.port, replace=small) as proxy:
        failed(request(proxy.port, method, "/v1/x", body=body.ljust(1025)), 413, "body_too_large", None)
        assert relay.seen() == []


def test_both_configurations_lead_to_the_relays_in_the_same_way() -> None:
    ways = []
    for name in ("nginx.conf", "nginx-tls.conf"):
        text = re.sub(r"#.*", "", (REPO / "nginx" / name).read_text(encoding="utf-8"))
        ways.append(text[text.index("include snippets/relay-health.conf") :].split())
    assert ways[0] == ways[1]


# --- Who may call ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "body"), ALL)
@pytest.mark.parametrize(
    "rule",
    [
        pytest.param("deny all;", id="deny"),
        pytest.param('auth_basic "closed"; auth_basic_user_file /dev/null;', id="auth_basic"),
        pytest.param("auth_request /health/live;", id="auth_request"),  # nobody is there to say yes
        pytest.param("limit_except COPY { deny all; }", id="limit_except"),
    ],
)
def test_who_may_call_is_asked_before_a_request_goes_any_way(method: str, body: bytes, rule: str) -> None:
    closed = {'try_files "" $relay_way;': f'{rule} try_files "" $relay_way;'}
    with Upstream(answers) as one, Upstream(answers) as other, behind(one.port, other.port, replace=closed) as proxy:
        response = request(proxy.port, method, "/v1/x", body=body)
        assert (response.status in (401, 403, 500), response.header("x-should-retry")) == (True, None)
        assert total([one, other]) == 0


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("rule", ["if ($arg_x) { set $relay_x 1; }", "limit_except COPY { allow all; }"])
def test_what_hides_try_files_leaves_a_request_to_one_relay(method: str, rule: str) -> None:
    """And not to the files of nginx's machine."""
    open_ = {'try_files "" $relay_way;': f'{rule} root /; try_files "" $relay_way;'}
    with Upstream(answers) as one, Upstream(answers) as other, behind(one.port, other.port, replace=open_) as proxy:
        assert ask(proxy.port, method, "/etc/hostname?x=1").body == b'{"whole": true}'
        assert total([one, other]) == 1


@pytest.mark.parametrize("path", ["/@relay_read", "/relay_post", "/.relay-error"])
def test_no_path_leads_to_the_ways_themselves(path: str) -> None:
    with Upstream(answers) as relay, behind(relay.port) as proxy:
        response = request(proxy.port, "GET", path)
        assert response.status == (404 if path == "/.relay-error" else 200)  # 200: a path as any other
