"""`relay doctor` against real chains: a sound one, and ones that are each wrong in one way; and the ticks that it asks
for.

The chains are looked at side by side, since each look waits in silence.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from harness import REPO, eventually, servers
from harness.calm import Pulse, undisturbed
from harness.client import Connection, request
from harness.upstream import Upstream

from relay.cli.doctor import command, hops
from relay.cli.doctor.findings import Observations, findings
from relay.cli.doctor.probe import Answer, Target, Unreachable, get, idle_until_closed
from relay.cli.doctor.timeline import Timeline, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from harness.servers import Gunicorn

KEY = "a-client-key-that-nobody-may-see"
HEARTBEAT = 2.5  # seconds; a read time-out of 2 s is too short for it
BUFFERED = {"proxy_buffering off;": "proxy_buffering on;"}
HTTP10 = {"proxy_http_version 1.1;": "proxy_http_version 1.0;"}
OBEYED = "proxy_ignore_headers X-Accel-Redirect X-Accel-Expires X-Accel-Limit-Rate X-Accel-Buffering X-Accel-Charset;"
# What nginx is given in place of what is shipped, and the findings that this must bring.
CHAINS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sound": ({}, []),
    "buffering as the relay wants it": ({"replace": {**BUFFERED, OBEYED: ""}}, []),
    "buffering": ({"replace": BUFFERED}, ["buffered"]),
    "gzip": ({"replace": {"gzip off;": "gzip on; gzip_types text/event-stream;"}}, ["compressed"]),
    "HTTP/1.0 to the relay": ({"replace": HTTP10}, ["http10"]),
    "buffering and HTTP/1.0": ({"replace": {**BUFFERED, **HTTP10}}, ["buffered", "http10"]),
    "a read time-out of 2 s": ({"replace": {"proxy_read_timeout 660s;": "proxy_read_timeout 2s;"}}, ["silence_cut"]),
    "a keep-alive of 2 s": ({"replace": {"keepalive_timeout 65s;": "keepalive_timeout 2s;"}}, ["short_keep_alive"]),
    "a cache": (
        {
            "replace": {
                **BUFFERED,
                "proxy_cache off;": "proxy_cache events; proxy_cache_valid 200 1m;",
                OBEYED: "proxy_ignore_headers Cache-Control X-Accel-Buffering;",
            },
            "extra_http": "proxy_cache_path run/cache keys_zone=events:1m;",
        },
        ["cached"],
    ),
}


def start(url: str, folder: Path, *args: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "relay", "doctor", url, *args],
        cwd=folder,
        env=servers.environment({"PYTHONPATH": str(REPO), "WEB_CONCURRENCY": "", **env}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=50)
    assert "Traceback" not in out + err, err
    assert KEY not in out + err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def doctor(url: str, folder: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return end(start(url, folder, *args, **env))


def names(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [one["name"] for one in json.loads(done.stdout)["findings"]]


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as found:
        yield found


@pytest.fixture(scope="module")
def relay(upstream: Upstream) -> Iterator[Gunicorn]:
    settings = {
        "RELAY_UPSTREAM_URL": upstream.base_url,
        "RELAY_HEARTBEAT": f"{HEARTBEAT}s",
        "RELAY_HOLD": "2s",
        "RELAY_CLIENT_KEYS": KEY,
    }
    with servers.gunicorn(settings) as running:
        yield running


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 127.0.0.1, by itself; its key is in the same file."""
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "1", "-subj", "/CN=relay", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", "key.pem", "-out", "certificate.pem"],
        cwd=folder, check=True, capture_output=True, timeout=30,
    )  # fmt: skip
    whole = folder / "whole.pem"
    whole.write_text((folder / "certificate.pem").read_text() + (folder / "key.pem").read_text())
    return whole


@pytest.fixture(scope="module")
def looked_at(
    relay: Gunicorn, certificate: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, subprocess.CompletedProcess[str]]]:
    """What the doctor said of each chain, and of the relay with nothing in front ("direct", "as text", "beside")."""
    empty, beside = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("beside")
    (beside / ".env").write_text(f"RELAY_HARTBEAT=5\nRELAY_UPSTREAM_KEY=two {KEY}\n")
    key = {"RELAY_CLIENT_KEY": KEY}
    with contextlib.ExitStack() as stack:
        ports = {"direct": relay.port}
        for name, (wrong, _) in CHAINS.items():
            ports[name] = stack.enter_context(servers.nginx(relay.port, relay.admin_port, **wrong)).port

        def look(*args: Any, **env: str) -> Callable[[], subprocess.Popen[str]]:
            return lambda: start(*args, **env)

        looks = {name: look(f"http://127.0.0.1:{port}", empty, "--json", **key) for name, port in ports.items()}
        looks["as text"] = look(f"{relay.base_url}/v1/chat/completions", empty, "--quick", "--key", KEY)
        looks["beside"] = look(*(relay.base_url, beside, "--quick", "--json", "--env-file", ".env"), **key)
        tls = f"ssl_certificate {certificate}; ssl_certificate_key {certificate};"
        for name, options in (("TLS alone", "ssl"), ("TLS and HTTP/2", "ssl http2")):
            listen = {"backlog=4096": f"backlog=4096 {options}"}
            proxy = stack.enter_context(servers.nginx(relay.port, relay.admin_port, tls, replace=listen))
            url = f"https://127.0.0.1:{proxy.port}/v1"
            looks[name] = look(url, empty, "--quick", "--json", SSL_CERT_FILE=str(certificate), **key)
        looks["TLS by a stranger"] = look(url, empty, "--quick", **key)
        looks["TLS by a stranger, but go on"] = look(url, empty, "--quick", "--json", "--insecure", **key)
        processes = {name: begin() for name, begin in looks.items()}
        for process in processes.values():
            stack.callback(process.kill)
        found = {name: end(process) for name, process in processes.items()}
        # So many at a time are in each other's way, and each measures tenths of a second: what comes as a surprise is
        # looked at again, alone; and again if the machine stood still meanwhile.
        for name, again in looks.items():
            for _ in range(4):
                if _as_expected(name, found[name]):
                    break
                with Pulse() as pulse:
                    found[name] = end(again())
                if pulse.longest() < 0.2:
                    break
        yield found


def _as_expected(name: str, done: subprocess.CompletedProcess[str]) -> bool:
    """Whether the tests below will be content with this look."""
    if name in ("as text", "TLS by a stranger"):
        return done.returncode == (0 if name == "as text" else 2)
    wanted = {"beside": ["settings"], "TLS alone": ["no_http2"]} | {chain: each[1] for chain, each in CHAINS.items()}
    return names(done) == wanted.get(name, []) and (
        name != "direct" or json.loads(done.stdout)["measured"]["arrival"] == "steady"
    )


# --- Chains


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_has_the_findings_that_it_must_have_and_no_others(
    looked_at: dict[str, subprocess.CompletedProcess[str]], chain: str
) -> None:
    done = looked_at[chain]
    wanted = CHAINS[chain][1]
    assert names(done) == wanted, done.stdout
    assert done.returncode == (1 if wanted else 0)


def test_the_relay_itself_is_sound(looked_at: dict[str, subprocess.CompletedProcess[str]]) -> None:
    done = looked_at["direct"]
    assert (done.returncode, names(done)) == (0, [])
    report = json.loads(done.stdout)
    assert report["url"].endswith("/v1")
    assert report["health"]["upstream"]["reachable"] is True
    assert report["measured"]["arrival"] == "steady"
    assert report["measured"]["relay_saw"]["forwarded"] == 0
    assert [one["stands"] for one in report["silences"]] == [True]


def test_tls_at_the_edge(looked_at: dict[str, subprocess.CompletedProcess[str]]) -> None:
    assert names(looked_at["TLS alone"]) == ["no_http2"]
    assert names(looked_at["TLS and HTTP/2"]) == []
    assert json.loads(looked_at["TLS and HTTP/2"].stdout)["http2"] is True
    assert names(looked_at["TLS by a stranger, but go on"]) == []
    refused = looked_at["TLS by a stranger"]
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "is not trusted: self-signed certificate" in refused.stderr


def test_what_is_found_is_explained_with_its_cure(looked_at: dict[str, subprocess.CompletedProcess[str]]) -> None:
    def told(chain: str) -> dict[str, str]:
        (one,) = json.loads(looked_at[chain].stdout)["findings"]
        return one

    assert "Server: nginx" in told("buffering")["explanation"]
    assert "proxy_buffering off;" in told("buffering")["cure"]
    assert "gzip off;" in told("gzip")["cure"]
    assert "proxy_http_version 1.1;" in told("HTTP/1.0 to the relay")["cure"]
    assert re.search(r"after 2\.[0-4] s of silence", told("a read time-out of 2 s")["explanation"])
    assert "proxy_read_timeout" in told("a read time-out of 2 s")["cure"]
    assert "proxy_cache off;" in told("a cache")["cure"]


def test_it_says_what_it_is_doing_while_one_waits(
    looked_at: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    assert "4 s of silence" in looked_at["sound"].stderr


# --- The command


def test_ctrl_c_ends_it_at_once_and_is_no_finding(relay: Gunicorn, tmp_path: Path) -> None:
    """Though it waits in a silence of 100 s."""
    process = start(relay.base_url, tmp_path, "--silence", RELAY_CLIENT_KEY=KEY)
    assert process.stderr is not None
    while "100 s of silence" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = end(process)
    assert (done.returncode, done.stdout) == (130, "")


def test_without_json_it_is_text_for_people(
    looked_at: dict[str, subprocess.CompletedProcess[str]], relay: Gunicorn
) -> None:
    done = looked_at["as text"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing is wrong with this chain." in done.stdout
    assert f"The relay was found at {relay.base_url}/v1." in done.stdout


def test_beside_the_service_it_checks_the_settings_too(
    looked_at: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    done = looked_at["beside"]
    assert (done.returncode, names(done)) == (1, ["settings"])
    (one,) = json.loads(done.stdout)["findings"]
    assert "RELAY_HEARTBEAT" in one["explanation"]
    assert "RELAY_UPSTREAM_KEY" in one["explanation"]
    assert "RELAY_CLIENT_KEY:" not in one["explanation"]  # the doctor's own is no fault


def test_a_dotenv_that_nothing_reads_is_told_if_it_has_settings_of_the_relays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shop's folder has a .env of its own more often than not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "dotenv", None)  # as if it were not installed
    assert command._dotenv_unread() == ()
    file = tmp_path / ".env"
    file.write_text("SECRET_KEY=of-the-shop\n")
    assert command._dotenv_unread() == ()
    file.write_text("SECRET_KEY=of-the-shop\nRELAY_MOUNT=/v1\n")
    (said,) = command._dotenv_unread()
    assert "pip install python-dotenv" in said


@pytest.mark.parametrize(("key", "finding"), [((), "key_needed"), (("--key", "another"), "key_refused")])
def test_a_key_that_is_missing_or_wrong(relay: Gunicorn, tmp_path: Path, key: tuple[str, ...], finding: str) -> None:
    done = doctor(f"http://127.0.0.1:{relay.port}", tmp_path, "--json", "--quick", *key)
    assert (done.returncode, names(done)) == (1, [finding])


@undisturbed(0.4)
def test_a_key_that_the_upstream_refuses_and_a_mount_at_the_root(tmp_path: Path) -> None:
    with Upstream() as upstream:
        upstream.serve(lambda ex: ex.reply(b"{}", 401), "/models")
        settings = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_UPSTREAM_KEY": "sk-refused", "RELAY_MOUNT": "/"}
        with servers.gunicorn(settings) as relay:
            done = doctor(f"http://localhost:{relay.port}", tmp_path, "--json", "--quick")
    assert (done.returncode, names(done)) == (1, ["upstream_key_rejected"]), done.stdout
    assert json.loads(done.stdout)["url"] == f"http://localhost:{relay.port}"
    assert [ex.path for ex in upstream.seen()] == ["/models"]


def test_a_name_that_the_relay_does_not_answer_to(tmp_path: Path) -> None:
    other_name = {"proxy_set_header Host $http_host;": "proxy_set_header Host relay.example;"}
    with servers.gunicorn({}) as relay, servers.nginx(relay.port, relay.admin_port, replace=other_name) as proxy:
        done = doctor(f"{proxy.base_url}/v1", tmp_path, "--json")
    assert (done.returncode, names(done)) == (1, ["refused"])
    (one,) = json.loads(done.stdout)["findings"]
    assert "RELAY_CLIENT_KEYS" in one["cure"]


def test_the_services_own_mount_is_tried_first(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("RELAY_MOUNT=/api/llm\n")
    with servers.gunicorn({"RELAY_MOUNT": "/api/llm", "RELAY_CLIENT_KEYS": KEY}) as relay:
        done = doctor(relay.base_url, tmp_path, "--json", "--env-file", ".env")
    assert names(done) == ["key_needed"]
    assert json.loads(done.stdout)["url"] == f"{relay.base_url}/api/llm"


@pytest.mark.parametrize(
    ("mount", "asked"),
    [pytest.param("/", "", id="at-the-root"), pytest.param("/v1", "/v1/models", id="a-call")],
)
def test_without_a_key_the_mount_is_not_taken_for_what_is_relayed_below_it(
    tmp_path: Path, mount: str, asked: str
) -> None:
    """What is relayed answers 401 there, whatever its path."""
    with servers.gunicorn({"RELAY_MOUNT": mount, "RELAY_CLIENT_KEYS": KEY}) as relay:
        done = doctor(relay.base_url + asked, tmp_path, "--json", "--quick")
    assert names(done) == ["key_needed"]
    report = json.loads(done.stdout)
    assert (report["url"], report["health"]["status"]) == (relay.base_url + mount.rstrip("/"), "ok")


@pytest.mark.parametrize(
    "url",
    [
        "relay.example.com",
        "ftp://relay.example.com",
        "http://",
        "http://me:pw@relay.example.com",
        "http://a/?b",
        "http://a:b",
    ],
)
def test_what_is_no_url_of_a_relay_is_a_sentence(tmp_path: Path, url: str) -> None:
    done = doctor(url, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "URL" in done.stderr


def test_where_there_is_no_relay_is_a_sentence_and_status_2(tmp_path: Path) -> None:
    done = doctor(f"http://127.0.0.1:{servers.free_port()}", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "does not accept connections" in done.stderr

    with Upstream() as other:
        done = doctor(other.base_url, tmp_path, "--json")
        assert done.returncode == 2
        assert "there is no relay (404 at /v1, 404 at /)" in json.loads(done.stdout)["error"]

    with servers.nginx(servers.free_port(), servers.free_port()) as proxy:
        done = doctor(proxy.base_url, tmp_path)
        assert done.returncode == 2
        assert "does not reach the relay behind it (the relay is not reachable)" in done.stderr
        assert done.stderr.endswith("at the address that the proxy has?\n")


@undisturbed(0.4)
def test_a_mounted_relay_with_a_login_on_plain_threads(tmp_path: Path, upstream: Upstream) -> None:
    (tmp_path / "shop.py").write_text(
        "import os\n"
        "from flask import Flask, abort, request\n"
        "from relay import Relay\n"
        "app = Flask(__name__)\n"
        "relay = Relay(app, url_prefix='/ai', settings={'RELAY_UPSTREAM_URL': os.environ['UPSTREAM'],"
        " 'RELAY_HEARTBEAT': 1, 'RELAY_HOLD': 1})\n"
        "@relay.before_request\n"
        "def login():\n"
        f"    if request.headers.get('X-Login') != '{KEY}': abort(401)\n"
    )
    env = {"PYTHONPATH": str(tmp_path), "UPSTREAM": upstream.base_url}
    (tmp_path / "elsewhere").mkdir(exist_ok=True)
    arguments = ["-k", "gthread", "--threads", "8", "--keep-alive", "65"]
    with servers.gunicorn(env, "shop:app", None, arguments, ready=None) as shop:
        url = f"http://127.0.0.1:{shop.port}/ai"
        done = doctor(f"{url}/chat/completions", tmp_path / "elsewhere", "--json", "--header", f"X-Login: {KEY}")
        assert (done.returncode, names(done)) == (0, []), done.stdout
        for key, finding in (((), "key_needed"), (("--key", "no"), "key_refused")):
            done = doctor(url, tmp_path / "elsewhere", "--json", "--quick", *key)
            (one,) = json.loads(done.stdout)["findings"]
            assert one["name"] == finding
            assert "not the relay" in one["explanation"]
            assert "--header" in one["cure"]
            assert not any("was found" in note for note in json.loads(done.stdout)["notes"])


# --- Ticks


def ticks(port: int, query: str = "", headers: dict[str, str] | None = None) -> Any:
    return request(port, "GET", f"/v1/_relay/ticks?{query}", {"x-api-key": KEY, **(headers or {})})


def test_ticks_come_one_at_a_time_with_the_headers_of_a_stream(relay: Gunicorn) -> None:
    response = ticks(relay.port, "n=4&ms=100&pad=50")
    body = response.finish()
    assert (response.status, body.ended) == (200, "clean")
    assert response.header("Content-Type") == b"text/event-stream; charset=utf-8"
    assert response.header("X-Accel-Buffering") == b"no"
    assert b"no-transform" in response.header("Cache-Control")
    assert response.header("Content-Security-Policy") == b"default-src 'none'; sandbox"
    assert response.header("X-Request-ID")
    events = [json.loads(event.removeprefix(b"data: ")) for event in body.data.split(b"\n\n")[:-1]]
    assert [event["tick"] for event in events] == [0, 1, 2, 3]
    assert {len(event["pad"]) for event in events} == {50}
    at = [event["ms"] for event in events]
    assert all(ms >= 100 * number for number, ms in enumerate(at))
    assert events[0]["heartbeat"] == HEARTBEAT
    assert events[0]["seen"] == {"protocol": "HTTP/1.1", "forwarded": 0, "connection": [], "via": False}

    def spread() -> bool:
        response = ticks(relay.port, "n=4&ms=100")
        response.finish()
        return response.arrivals[-1][0] - response.arrivals[0][0] > 0.2

    eventually(spread, "ticks that arrive one after another")


def test_ticks_can_have_a_length_be_cut_and_be_silent(relay: Gunicorn) -> None:
    response = ticks(relay.port, "n=3&ms=20&framing=length")
    assert response.framing == "length"
    assert response.finish().ended == "clean"
    response = ticks(relay.port, "n=3&ms=20&end=cut")
    body = response.finish()
    assert (body.data.count(b"\n\n"), body.ended) == (3, "cut")
    began = time.monotonic()
    assert ticks(relay.port, "n=2&ms=10&silence=1").finish().data.count(b"\n") == 4  # no heartbeat in between
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize(
    "query",
    ["n=0", "n=201", "n=x", "n=-1", "n=%D9%A3", "n=1e2", "ms=9", "ms=5001", "silence=121", "pad=4097", "n=200&ms=5000",
     "n=200&pad=4000", "ms=99999999999999999999"],
)  # fmt: skip
def test_ticks_are_bounded(relay: Gunicorn, query: str) -> None:
    response = ticks(relay.port, query)
    assert response.status == 400
    assert json.loads(response.finish().data)["error"]["code"] == "bad_request"


def test_ticks_are_for_whoever_may_use_the_relay(relay: Gunicorn) -> None:
    for headers, status in (
        ({"x-api-key": "another"}, 401),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ):
        assert ticks(relay.port, "n=1", headers).status == status
    with servers.gunicorn({}) as open_to_loopback:
        assert ticks(open_to_loopback.port, "n=1").status == 200
        assert ticks(open_to_loopback.port, "n=1", {"Host": "elsewhere.example"}).status == 403


def test_a_head_request_gets_the_head_alone(relay: Gunicorn) -> None:
    with Connection(relay.port) as connection:
        response = connection.request("HEAD", "/v1/_relay/ticks?n=20&ms=5000", {"x-api-key": KEY})
        assert response.status == 200
        assert response.finish().data == b""


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_ticks_are_few_at_a_time_and_end_with_their_client(worker: str, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from flask import Flask\n"
        "from relay import Relay\n"
        "from relay.stream import ticks\n"
        "app = Flask(__name__)\n"
        "Relay(app, url_prefix='/v1', settings={'RELAY_UPSTREAM_URL': 'http://127.0.0.1:9'})\n"
        "@app.get('/open')\n"
        "def open(): return str(ticks.budget.open)\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    most = 20 if worker == "gevent" else 6
    with servers.gunicorn(env, "shop:app", None, ["-k", worker, "--threads", "10"], ready="/open") as shop:

        def are_open() -> int:
            return int(request(shop.port, "GET", "/open").finish().data)

        waiting = [Connection(shop.port) for _ in range(most)]
        for connection in waiting:
            connection.send("GET", "/v1/_relay/ticks?n=2&silence=100")
            connection.read_head().read_event()
        refused = ticks(shop.port)
        assert refused.status == 429
        assert json.loads(refused.finish().data)["error"]["code"] == "too_many_ticks"
        assert refused.header("Retry-After") in (b"2", b"3")
        assert are_open() == most
        for connection in waiting:
            connection.close()
        eventually(lambda: are_open() == 0, "the streams of those who left are over")


def test_ticks_are_rate_limited(relay: Gunicorn) -> None:
    with servers.gunicorn({}) as other:
        began = time.monotonic()
        assert [ticks(other.port, "n=1").status for _ in range(100)] == [200] * 100
        allowed = 0
        while ticks(other.port, "n=1").status == 200:
            allowed += 1
            assert allowed <= 1 + time.monotonic() - began, "one more each second"


def test_a_drain_ends_ticks_with_a_word(tmp_path: Path) -> None:
    with servers.gunicorn({"RELAY_DRAIN": "0.5s"}) as relay:
        response = ticks(relay.port, "n=2&silence=60")
        response.read_event()
        relay.stop()
        body = response.finish()
        assert b'"code": "drained"' in body.data
        assert body.ended == "cut"


# --- From what was seen to what is wrong


def timeline(arrivals: list[float], headers: dict[str, str] | None = None, *, every: float = 0.2) -> Timeline:
    """15 ticks, one each 0.2 s, that arrived then."""
    answer = Answer(200, "HTTP/1.1", list((headers or {}).items()), 0.0, ended="clean", ended_at=max(arrivals))
    for number, at in enumerate(arrivals):
        tick: dict[str, Any] = {"tick": number, "of": len(arrivals), "ms": number * every * 1000}
        if not number:
            tick |= {"seen": {"protocol": "HTTP/1.1"}, "run": "r", "heartbeat": 15, "hold": 20}
        answer.pieces.append((at, b"data: " + json.dumps(tick).encode() + b"\n\n"))
    return read(answer)


STEADY = [0.2 * number for number in range(15)]


def found(seen: Observations) -> list[str]:
    return [one.name for one in findings(seen)]


@pytest.mark.parametrize(
    ("arrivals", "arrival"),
    [
        pytest.param(STEADY, "steady", id="steady"),
        pytest.param([at + 3 for at in STEADY], "steady", id="far away"),
        pytest.param([at + 0.1 * (number % 3) for number, at in enumerate(STEADY)], "steady", id="jitter"),
        pytest.param([2.9] * 15, "at the end", id="at the end"),
        pytest.param([1.0] * 5 + [2.0] * 5 + [2.9] * 5, "in lumps", id="lumps"),
        pytest.param([*STEADY[:5], *[2.0] * 5, *STEADY[10:]], "uneven", id="one stall"),
    ],
)
def test_how_events_arrived(arrivals: list[float], arrival: str) -> None:
    assert timeline(arrivals).arrival == arrival


def test_lumps_name_their_size_and_who_is_there() -> None:
    pace = timeline([1.0] * 5 + [2.0] * 5 + [2.9] * 5, {"Server": "cloudflare", "CF-RAY": "1-FRA"})
    (one,) = findings(Observations(pace=pace))
    assert one.name == "lumps"
    assert "3 lumps" in one.explanation
    assert "CF-RAY: 1-FRA" in one.explanation
    assert "Cloudflare" in one.cure


def test_a_cut_that_arrives_as_an_end() -> None:
    whole = timeline([0.0, 0.1])
    assert found(Observations(pace=timeline(STEADY), broken=whole)) == ["cut_looks_whole"]
    whole.answer.ended = "cut"
    assert found(Observations(pace=timeline(STEADY), broken=whole)) == []


@pytest.mark.parametrize(("after", "finding"), [(10.0, "silence_cut"), (60.0, "short_timeout")])
def test_a_time_out_is_measured_against_the_heartbeat(after: float, finding: str) -> None:
    silent = timeline([0.1, 0.2])
    silent.ticks.pop()
    silent.answer.pieces.pop()
    silent.answer.ended, silent.answer.ended_at = "cut", 0.1 + after
    (one,) = findings(Observations(pace=timeline(STEADY), silences=[(100.0, silent)]))
    assert one.name == finding
    assert f"{after:g}" in one.explanation


def test_an_idle_connection_that_is_closed_soon() -> None:
    (one,) = findings(Observations(pace=timeline(STEADY), kept=2.04))
    assert one.name == "short_keep_alive"
    assert "2.0 s" in one.explanation
    assert "--keep-alive 65" in one.cure


def test_an_edge_without_http2_and_a_stored_answer() -> None:
    assert found(Observations(pace=timeline(STEADY), http2=False)) == ["no_http2"]
    assert found(Observations(pace=timeline(STEADY), http2=True)) == []
    assert found(Observations(pace=timeline(STEADY, {"X-Cache": "Hit from cloudfront"}))) == ["cached"]
    assert found(Observations(pace=timeline(STEADY, {"X-Cache": "Miss from cloudfront", "Age": "0"}))) == []


@pytest.mark.parametrize(
    ("health", "names"),
    [
        ({"status": "ok", "upstream": {"key": "accepted"}}, []),
        ({"status": "down", "upstream": {"error": "no such name"}}, ["upstream_down"]),
        ({"status": "degraded", "upstream": {"status_code": 503, "key": "not checked"}}, ["upstream_degraded"]),
        ({"status": "degraded", "upstream": {"status_code": 401, "key": "rejected"}}, ["upstream_key_rejected"]),
        ({"status": "draining", "upstream": {}}, ["draining"]),
        ({"status": "down", "upstream": None}, ["upstream_down"]),
    ],
)
def test_what_health_says_is_told(health: dict[str, Any], names: list[str]) -> None:
    assert found(Observations(pace=timeline(STEADY), health=health)) == names


def test_heartbeats_that_are_off() -> None:
    pace = timeline(STEADY)
    pace.told["heartbeat"] = 0
    assert found(Observations(pace=pace)) == ["heartbeats_off"]


def test_every_finding_is_told_in_the_readme() -> None:
    source = "".join(file.read_text() for file in (REPO / "relay/cli/doctor").rglob("*.py"))
    made = set(re.findall(r'Finding\(\s*"(\w+)"', source))
    assert {"buffered", "settings"} <= made
    readme = (REPO / "README.md").read_text()
    table = readme[readme.index("| finding |") : readme.index("## Troubleshooting")]
    told = [
        name for row in table.splitlines() if row.startswith("|") for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(told) == sorted(made)


def test_hops_are_known_by_their_headers() -> None:
    headers = [("Server", "nginx/1.2"), ("Via", "1.1 abc.cloudfront.net (CloudFront)"), ("X-Other", "nginx")]
    assert [hop.name for hop in hops.known(headers)] == ["nginx", "CloudFront"]
    assert hops.signs(headers) == ["Server: nginx/1.2", "Via: 1.1 abc.cloudfront.net (CloudFront)"]


# --- The probe


@contextlib.contextmanager
def answering(*pieces: bytes, wait: float | None = 0.02) -> Iterator[Target]:
    """A server that sends these to whoever asks, and closes; None: only when the other has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                peer, _ = listener.accept()
                with peer:
                    peer.recv(65536)
                    for piece in pieces:
                        peer.sendall(piece)
                        if wait is None:
                            peer.recv(1)
                        else:
                            time.sleep(wait)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Target("http", "127.0.0.1", listener.getsockname()[1], "")
        thread.join(10)


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "body", "ended"),
    [
        pytest.param([HEAD, b"3\r\nabc\r\n0\r\n\r\n"], b"abc", "clean", id="chunked"),
        pytest.param([*map(bytes, zip(HEAD + b"3;x\r\nabc\r\n0\r\nT: 1\r\n\r\n"))], b"abc", "clean", id="bytes"),
        pytest.param([HEAD, b"5\r\nabc"], b"abc", "cut", id="half a chunk"),
        pytest.param([HEAD, b"3\r\nabc\r\n"], b"abc", "cut", id="no last chunk"),
        pytest.param([HEAD, b"zz\r\nabc\r\n"], b"", "cut", id="no chunk"),
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcd"], b"abc", "clean", id="length"),
        pytest.param([b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc"], b"abc", "cut", id="too short"),
        pytest.param([b"HTTP/1.0 200 OK\r\n\r\nab", b"c"], b"abc", "clean", id="until close"),
        pytest.param([b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", b"abc"], b"abc", "clean", id="interim"),
    ],
)  # fmt: skip
def test_framing(pieces: list[bytes], body: bytes, ended: str) -> None:
    with answering(*pieces, wait=0.001) as target:
        answer = get(target, "/", [], patience=5)
        assert (answer.status, answer.body, answer.ended) == (200, body, ended)


def test_a_body_that_stands_still_is_not_waited_for_for_ever() -> None:
    with answering(HEAD + b"3\r\nabc\r\n", wait=None) as target:
        answer = get(target, "/", [], patience=0.3)
        assert (answer.body, answer.ended) == (b"abc", "waiting")


LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n"


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        pytest.param(LENGTH + b"\r\na", True, id="without a word"),
        pytest.param(LENGTH + b"Connection: Close\r\n\r\na", False, id="it says so"),
        pytest.param(b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\na", False, id="HTTP 1.0"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\na", False, id="the end of the body"),
    ],
)
def test_a_connection_that_the_server_closes(answer: bytes, seen: bool) -> None:
    with answering(answer) as target:
        kept = idle_until_closed(target, "/", [], patience=5, most=10)
        assert kept is None if not seen else kept is not None and kept < 5


def test_a_connection_that_the_server_keeps() -> None:
    with answering(LENGTH + b"\r\na", wait=None) as target:
        assert idle_until_closed(target, "/", [], patience=5, most=0.1) is None


def test_gunicorns_own_keep_alive_is_short() -> None:
    with servers.gunicorn({}, "wsgi:app", None, ["-k", "gevent"], ready=None) as server:
        target = Target("http", "127.0.0.1", server.port, "")
        assert idle_until_closed(target, "/health/live", [], patience=10, most=10) is not None


@pytest.mark.parametrize("said", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200", b"HTTP/1.1 twenty\r\n\r\n"])
def test_what_does_not_speak_http_is_not_reached(said: bytes) -> None:
    with answering(said) as target, pytest.raises(Unreachable, match=f"127.0.0.1:{target.port}"):
        get(target, "/", [], patience=5)
