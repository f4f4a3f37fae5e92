"""Where the page is served, and with what: in the service, behind nginx, in a shop under a prefix, and not unasked."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from harness import REPO, servers
from harness.client import request
from harness.trying import CHAT, Trying, says
from harness.upstream import Upstream
from playwright.sync_api import expect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Service
    from harness.client import Response
    from harness.servers import Gunicorn
    from playwright.sync_api import Page

FILES = [*sorted(path.name for path in (REPO / "relay" / "static").glob("page*.*")), "favicon.svg"]


@pytest.fixture(scope="module")
def shop() -> Iterator[tuple[Upstream, Gunicorn]]:
    with Upstream() as upstream:
        upstream.by_hand(CHAT)
        env = {"PYTHONPATH": str(REPO / "tests"), "TRYOUT_URL": upstream.base_url}
        with servers.gunicorn(env, "shops.tryout:app", None, ["-k", "gevent"], ready="/login") as running:
            yield upstream, running


def policy(response: Response) -> dict[str, str]:
    value = response.header("Content-Security-Policy") or b""
    return dict(part.strip().split(" ", 1) for part in value.decode().split(";"))


def test_the_page_has_a_strict_policy_and_no_line_that_needs_a_laxer_one(hop: Service) -> None:
    page = request(hop.port, "GET", "/")
    assert page.status == 200
    assert page.header("Content-Type") == b"text/html; charset=utf-8"
    assert policy(page) == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert page.header("X-Content-Type-Options") == b"nosniff"
    assert page.header("Referrer-Policy") == b"no-referrer"
    assert page.header("Cross-Origin-Opener-Policy") == b"same-origin"
    assert b"camera=()" in (page.header("Permissions-Policy") or b"")
    assert page.header("Set-Cookie") is None
    html = page.finish().data.decode()
    assert re.findall(r"<style|<script(?![^>]* src=)|\son\w+=|\sstyle=|javascript:", html) == []
    named = re.findall(r'\s(?:src|href)="([^"]*)"', html)
    assert all(name.startswith(("./", "#")) for name in named), "nothing from elsewhere, and nothing from a root"


@pytest.mark.parametrize("name", [*FILES, "relay-client.js"])
def test_its_files_are_there_and_asked_for_again_cost_nothing(hop: Service, name: str) -> None:
    path = "/" if name == "page.html" else f"/{name}"
    first = request(hop.port, "GET", path)
    assert first.status == 200
    assert first.finish().data == (REPO / "relay" / "static" / name).read_bytes()
    assert first.header("Cache-Control") == b"no-cache"
    again = request(hop.port, "GET", path, headers=[("If-None-Match", first.header("ETag") or b"")])
    assert (again.status, again.finish().data) == (304, b"")


def test_nothing_is_written_as_html_in_the_pages_own_code() -> None:
    """What Trusted Types forbid in Chromium is not there for other browsers either."""
    forbidden = r"(inner|outer|insertAdjacent)HTML|document\.write|\beval\b|new Function|(local|session)Storage"
    for name in FILES:
        assert re.findall(forbidden, (REPO / "relay" / "static" / name).read_text()) == [], name


def test_in_a_shop_it_is_under_the_relays_prefix_and_behind_the_shops_login(
    shop: tuple[Upstream, Gunicorn], page: Page
) -> None:
    upstream, running = shop
    assert request(running.port, "GET", "/shop/ai/_relay/").status == 402
    page.goto(f"{running.base_url}/login")
    trying = Trying(page, f"{running.base_url}/shop/ai/_relay/")
    expect(trying["health-text"]).to_have_text("Upstream ok")
    assert f"{running.base_url}/shop/ai/_relay/api/stream-chat" in trying["curl"].inner_text()
    trying.ask("Hello?")
    exchange = upstream.next(CHAT)
    assert exchange.header("Cookie") is None
    says(exchange, ["From ", "the shop."])
    trying.ends("complete")
    assert trying.text == "From the shop."
    below = f"{running.base_url}/shop/ai/_relay/"
    assert [url for url in trying.asked if not url.startswith(below)] == []
    trying.check()


def test_in_a_shop_it_is_not_there_unasked(shop: tuple[Upstream, Gunicorn]) -> None:
    """Nor does the upstream see its paths."""
    _, running = shop
    for name in ("", "page.js", "page.css"):
        answer = request(running.port, "GET", f"/shop/plain/_relay/{name}")
        assert (answer.status, json.loads(answer.finish().data)["error"]["code"]) == (404, "not_found")


def test_a_relay_of_every_path_still_has_it() -> None:
    with servers.gunicorn({"RELAY_MOUNT": "/"}) as relay:
        page = request(relay.port, "GET", "/")
        assert page.finish().data == (REPO / "relay" / "static" / "page.html").read_bytes()
