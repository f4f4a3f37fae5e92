"""Client keys: who shows one may call, and nobody else; no key goes upstream or into the log."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from harness import REPO, eventually, servers
from harness.client import NoResponse, request
from harness.upstream import Upstream
from itsdangerous import BadData, URLSafeTimedSerializer

from relay import errors
from relay.gate.keys import ClientKeys, client_name, is_google, short_keys
from relay.shared import reports

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEYS = "first-key,second-key"


@pytest.fixture(scope="module")
def keyed() -> Iterator[tuple[Upstream, servers.Gunicorn]]:
    with Upstream() as upstream:
        env = {
            "RELAY_UPSTREAM_URL": upstream.base_url,
            "RELAY_UPSTREAM_KEY": "of-the-upstream",
            "RELAY_CLIENT_KEYS": KEYS,
            "RELAY_ALLOW": "*",
        }
        with servers.gunicorn(env) as relay:
            yield upstream, relay


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(("Authorization", "Bearer first-key"), id="bearer"),
        pytest.param(("authorization", "bearer second-key"), id="any-case"),
        pytest.param(("x-api-key", "second-key"), id="x-api-key"),
        pytest.param(("api-key", "first-key"), id="api-key"),
    ],
)
def test_a_known_key_opens_and_stays_here(keyed: tuple[Upstream, servers.Gunicorn], header: tuple[str, str]) -> None:
    upstream, relay = keyed
    path = upstream.serve(lambda ex: ex.reply(b"ok"))
    assert request(relay.port, "POST", "/v1" + path, [header], b"{}").status == 200
    ex = upstream.next(path)
    assert ex.all("Authorization") == [b"Bearer of-the-upstream"]
    assert ex.all("x-api-key") == ex.all("api-key") == []
    assert not any(key in relay.log() for key in ("first-key", "second-key", "of-the-upstream"))


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([], id="none"),
        pytest.param([("Authorization", "Bearer third-key")], id="unknown"),
        pytest.param([("Authorization", "first-key")], id="no-bearer"),
        pytest.param([("Authorization", "Basic first-key")], id="basic"),
        pytest.param([("Authorization", "Bearer first-ke")], id="a-part"),
        pytest.param([("Authorization", f"Bearer {KEYS}")], id="the-whole-list"),
        pytest.param([("Authorization", "Bearer of-the-upstream")], id="the-upstreams"),
        pytest.param([("x-api-key", "")], id="empty"),
        pytest.param([("x-api-key", "\xff\xfe")], id="bytes"),
    ],
)
def test_anything_else_is_401_and_reaches_nobody(
    keyed: tuple[Upstream, servers.Gunicorn], headers: list[tuple[str, str]]
) -> None:
    upstream, relay = keyed
    path = upstream.serve(lambda ex: ex.reply(b"ok"))
    response = request(relay.port, "POST", "/v1" + path, headers, b"{}")
    assert (response.status, response.header("WWW-Authenticate")) == (401, b"Bearer")
    assert json.loads(response.finish().data)["error"]["code"] == "invalid_api_key"
    assert upstream.seen(path) == []


def test_with_keys_the_relay_may_be_called_by_any_name(keyed: tuple[Upstream, servers.Gunicorn]) -> None:
    upstream, relay = keyed
    path = upstream.serve(lambda ex: ex.reply(b"ok"))
    headers = [("Host", "relay.example"), ("X-Forwarded-For", "203.0.113.9"), ("x-api-key", "first-key")]
    assert request(relay.port, "POST", "/v1" + path, headers, b"{}").status == 200


def test_health_needs_no_key(keyed: tuple[Upstream, servers.Gunicorn]) -> None:
    _, relay = keyed
    assert request(relay.port, "GET", "/health/live").status == 200


# --- A file of keys


@pytest.mark.parametrize("config", ["gunicorn.conf.py", "python:relay.gunicorn_conf"])
def test_a_file_of_keys_is_read_again_on_reload(tmp_path: Path, config: str) -> None:
    file = tmp_path / "keys"
    file.write_text("# who may\nold-key\n")

    def statuses() -> list[int]:
        return [request(relay.port, "GET", "/v1/x", {"x-api-key": key}).status for key in ("old-key", "new-key")]

    def reloaded() -> bool:
        try:
            return statuses() == [401, 200]
        except (NoResponse, OSError):
            return False  # a request too slow for the old worker's last second

    with Upstream(lambda ex: ex.reply(b"ok")) as upstream:
        env = {"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_CLIENT_KEYS": f"@{file}", "RELAY_DRAIN": "1"}
        with servers.gunicorn(env, config=config) as relay:
            assert statuses() == [200, 401]
            file.write_text("new-key\n")
            assert statuses() == [200, 401], "not before it is told to"
            old = relay.workers()
            relay.reload(changed=False)
            eventually(reloaded, "the new keys", 20)
            eventually(lambda: len(relay.workers()) == 1 and relay.workers() != old, "the old worker's end", 20)

            # A reload with a faulty file changes nothing, and a worker that is replaced then has what the others have.
            file.write_text("\n")
            relay.reload(changed=False)
            relay.wait_log("running on as before", 20)
            assert statuses() == [401, 200]
            file.unlink()
            killed = relay.kill_worker()
            eventually(lambda: relay.workers() not in ([], [killed]), "another worker", 20)
            eventually(lambda: request(relay.port, "GET", "/health/live").status == 200, "it serves")
            assert statuses() == [401, 200]
            assert relay.log().count("running on as before") == 1
            assert "new-key" not in relay.log()


def test_a_ticket_opens_for_an_eventsource_and_does_not_go_upstream(keyed: tuple[Upstream, servers.Gunicorn]) -> None:
    upstream, relay = keyed
    given = request(relay.port, "POST", "/ticket", [("x-api-key", "first-key")])
    assert given.header("Cache-Control") == b"no-store"
    ticket = json.loads(given.finish().data)
    assert ticket["expires_in"] == 60
    path = upstream.serve(lambda ex: ex.reply(b"data: 1\n\n", headers=[("Content-Type", "text/event-stream")]))
    for query, expected in (("a=%20b&ticket={}&c", "?a=%20b&c"), ("ticket={}", ""), ("ticket={}&ticket=x", "")):
        target = f"/v1{path}?{query.format(ticket['ticket'])}"
        assert request(relay.port, "GET", target).status == 200
        assert upstream.next(path).target.decode() == path + expected
    assert ticket["ticket"] not in relay.log()


@pytest.mark.parametrize("ticket", ["", "x", "ImtleTphYmMi.aaaaaa.bbbbbbbbbbbbbbbbbbbbbbbbbbb", "%FF"])
def test_a_ticket_that_was_not_given_opens_nothing(keyed: tuple[Upstream, servers.Gunicorn], ticket: str) -> None:
    upstream, relay = keyed
    path = upstream.serve(lambda ex: ex.reply(b"ok"))
    assert request(relay.port, "GET", f"/v1{path}?ticket={ticket}").status == 401
    assert upstream.seen(path) == []


def ticket_of(keys: ClientKeys, key: str) -> str:
    digest = keys.check({"HTTP_X_API_KEY": key})
    assert digest is not None
    return keys.tickets.make(digest)


def test_a_ticket_dies_with_its_key_and_lives_on_with_others_going() -> None:
    secret = "of-sixteen-characters-or-more"
    ticket = ticket_of(ClientKeys(["one", "two"], ticket_secret=secret), "two")
    assert ClientKeys(["two", "three"], ticket_secret=secret).take_ticket(f"ticket={ticket}")[0] is not None
    with pytest.raises(errors.Unauthorized):
        ClientKeys(["one", "three"], ticket_secret=secret).take_ticket(f"ticket={ticket}")


def test_a_ticket_says_nothing_by_which_a_key_could_be_guessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its holder knows the ticket and guesses the key, and can compute whatever is computed from these."""
    monkeypatch.setenv(reports.FOLDER, str(tmp_path / "run"))
    ticket = ticket_of(ClientKeys(["beta"]), "beta")
    known = base64.urlsafe_b64decode(ticket.partition(".")[0] + "==")
    digest = sha256(b"beta").digest()
    for text in (b"beta", digest, digest.hex().encode(), digest.hex()[:12].encode()):
        assert text not in known
    for guess in (b"beta", digest, b"".join([digest])):
        with pytest.raises(BadData):
            URLSafeTimedSerializer(guess, salt="relay-ticket").loads(ticket)


def test_workers_of_a_host_share_a_secret_that_outlives_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(reports.FOLDER, str(tmp_path / "run"))
    ticket = ticket_of(ClientKeys(["a-key"]), "a-key")
    program = (
        "import sys; from relay.gate.keys import ClientKeys\n"
        "print(ClientKeys(['a-key']).take_ticket('ticket=' + sys.argv[1])[0])"
    )
    command = [sys.executable, "-c", program, ticket]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO, timeout=30)
    assert done.stdout.startswith("key:")
    (secret,) = (tmp_path / "run").iterdir()
    assert secret.stat().st_mode & 0o077 == 0
    assert len(secret.read_bytes()) == 32


def test_without_a_folder_tickets_hold_in_one_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").write_text("in the way")
    monkeypatch.setenv(reports.FOLDER, str(tmp_path / "run"))
    keys = ClientKeys(["a-key"])
    assert keys.take_ticket(f"ticket={ticket_of(keys, 'a-key')}")[0] is not None
    assert "RELAY_TICKET_SECRET" in caplog.text


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        pytest.param([], "", id="none"),
        pytest.param(["x" * 16], "", id="long"),
        pytest.param(["beta", "x" * 40], "1 of 2 keys has", id="one"),
        pytest.param(["beta", "gamma"], "2 of 2 keys have", id="both"),
    ],
)
def test_short_keys_are_reported_without_being_named(keys: list[str], said: str) -> None:
    sentence = short_keys(keys)
    assert said in sentence
    assert bool(sentence) is bool(said)
    assert not any(key in sentence for key in keys)


def test_the_service_reports_short_keys_once(keyed: tuple[Upstream, servers.Gunicorn]) -> None:
    _, relay = keyed
    assert relay.log().count("fewer than 16 characters") == 1


# --- Where a key may stand, and must not go on


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(("x-goog-api-key", "second-key"), id="a-place-of-a-key"),
        pytest.param(("X-My-Key", "first-key"), id="any-header"),
        pytest.param(("X-Auth", "Token first-key"), id="behind-a-scheme"),
        pytest.param(("X-Creds", 'key="second-key", v=1'), id="quoted"),
    ],
)
def test_a_client_key_goes_upstream_in_no_header(
    keyed: tuple[Upstream, servers.Gunicorn], header: tuple[str, str]
) -> None:
    upstream, relay = keyed
    path = upstream.serve(lambda ex: ex.reply(b"ok"))
    headers = [("Authorization", "Bearer first-key"), header, ("X-Kept", "first-key-not")]
    assert request(relay.port, "POST", "/v1" + path, headers, b"{}").status == 200
    ex = upstream.next(path)
    assert ex.all(header[0]) == []
    assert ex.all("X-Kept") == [b"first-key-not"]


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        pytest.param("key=first-key&a=1", "?a=1", id="by-its-value"),
        pytest.param("x=%66irst-key&a=1", "?a=1", id="encoded"),
        pytest.param("a=1&token=second-key&token=first-key", "?a=1", id="several"),
        pytest.param("key=first-key", "", id="alone"),
        pytest.param("key=room1&access_token=x", "?key=room1&access_token=x", id="an-ordinary-name"),
        pytest.param("a=first-key-2&b=%20&c", "?a=first-key-2&b=%20&c", id="only-whole-values"),
    ],
)
def test_a_client_key_goes_upstream_in_no_query(
    keyed: tuple[Upstream, servers.Gunicorn], query: str, kept: str
) -> None:
    upstream, relay = keyed
    path = upstream.serve(lambda ex: ex.reply(b"ok"))
    assert request(relay.port, "GET", f"/v1{path}?{query}", [("x-api-key", "first-key")]).status == 200
    assert upstream.next(path).target.decode() == path + kept


@pytest.mark.parametrize("name", ["key", "access_token", "oauth_token", "Key", "%6Bey"])
def test_in_front_of_googles_apis_the_query_is_a_place_of_a_key(name: str) -> None:
    keys = ClientKeys(["a-client-key"], google=True)
    query = f"alt=sse&{name}=a-client-key"
    assert keys.check({}, query) == sha256(b"a-client-key").digest()
    assert keys.query_without_keys(query, own_credentials=True) == "alt=sse"
    assert keys.query_without_keys(f"{name}=of-somebody", own_credentials=True) is None
    with pytest.raises(errors.Unauthorized):
        ClientKeys(["a-client-key"]).check({}, query)
    nobodys = ClientKeys([], google=True)
    assert nobodys.query_without_keys(query, own_credentials=True) == "alt=sse"
    assert nobodys.query_without_keys(query, own_credentials=False) == query


@pytest.mark.parametrize(
    ("host", "google"),
    [
        ("generativelanguage.googleapis.com", True),
        ("us-central1-aiplatform.googleapis.com:443", True),
        ("GenerativeLanguage.GoogleAPIs.com", True),
        ("googleapis.com.evil.example", False),
        ("notgoogleapis.com", False),
        ("api.openai.com", False),
    ],
)
def test_which_hosts_are_googles(host: str, google: bool) -> None:
    assert is_google(host) is google


def test_a_ticket_is_good_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "of-sixteen-characters-or-more"
    keys = ClientKeys(["a-key"], ticket_secret=secret)
    ticket = ticket_of(keys, "a-key")
    assert keys.take_ticket(f"ticket={ticket}") == (client_name(sha256(b"a-key").digest()), None)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 62)
    with pytest.raises(errors.Unauthorized):
        keys.take_ticket(f"ticket={ticket}")
    with pytest.raises(errors.Unauthorized):
        ClientKeys(["another"], ticket_secret=secret).take_ticket(f"ticket={ticket}")
    assert ClientKeys([]).take_ticket(f"ticket={ticket}") == (None, f"ticket={ticket}"), "without keys it is a query"


def test_a_ticket_costs_a_key(keyed: tuple[Upstream, servers.Gunicorn]) -> None:
    _, relay = keyed
    assert request(relay.port, "POST", "/ticket").status == 401
    assert request(relay.port, "POST", "/ticket", [("x-api-key", "no-key")]).status == 401
