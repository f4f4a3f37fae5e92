"""Who may call: the client's address, its origin and its host, out of a WSGI environ."""

from __future__ import annotations

import contextlib
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import errors
from relay.gate.address import client_address
from relay.gate.origin import check_host, check_origin, check_peer
from relay.settings import Settings


def settings(**more: object) -> Settings:
    given = {f"RELAY_{name.upper()}": value for name, value in more.items()}
    return Settings.from_mapping({"RELAY_UPSTREAM_URL": "https://api.example/v1", **given})


PLAIN = settings()
TRUSTING = settings(trusted_proxies="127.0.0.1,::1,10.0.0.0/8,2001:db8:1::/48")


# --- the client's address -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        pytest.param("203.0.113.7", None, "203.0.113.7", id="direct"),
        pytest.param("203.0.113.7", "198.51.100.1", "203.0.113.7", id="a-stranger-says-what-it-likes"),
        pytest.param("203.0.113.7", "127.0.0.1", "203.0.113.7", id="a-stranger-says-it-is-local"),
        pytest.param("127.0.0.1", None, "127.0.0.1", id="local"),
        pytest.param("127.0.0.1", "203.0.113.7", "203.0.113.7", id="through-a-proxy"),
        pytest.param("127.0.0.1", "127.0.0.1, 203.0.113.7", "203.0.113.7", id="what-the-client-wrote-is-left-of-it"),
        pytest.param("127.0.0.1", "junk, <x>, 203.0.113.7", "203.0.113.7", id="junk-left-of-it"),
        pytest.param("127.0.0.1", "203.0.113.7, 10.1.2.3", "203.0.113.7", id="two-proxies"),
        pytest.param("10.9.9.9", "203.0.113.7,10.1.2.3,10.1.2.4", "203.0.113.7", id="three-proxies"),
        pytest.param("127.0.0.1", "10.1.2.3", "10.1.2.3", id="a-proxy-of-its-own-accord"),
        pytest.param("127.0.0.1", "", "127.0.0.1", id="empty"),
        pytest.param("127.0.0.1", " , ", "127.0.0.1", id="empty-items"),
        pytest.param("127.0.0.1", "203.0.113.7, ", "203.0.113.7", id="an-empty-item-last"),
        pytest.param("127.0.0.1", "unknown", "unknown", id="unknown-is-not-the-proxy-itself"),
        pytest.param("127.0.0.1", "203.0.113.7, unknown", "unknown", id="unknown-hides-what-stands-left"),
        pytest.param("127.0.0.1", "_hidden", "unknown", id="obfuscated"),
        pytest.param("127.0.0.1", "203.0.113.7:4711", "203.0.113.7", id="with-port"),
        pytest.param("127.0.0.1", "[2001:db8::1]:4711", "2001:db8::1", id="ipv6-with-port"),
        pytest.param("127.0.0.1", "[2001:db8::1]", "2001:db8::1", id="ipv6-in-brackets"),
        pytest.param("127.0.0.1", "2001:DB8:0::1", "2001:db8::1", id="ipv6-spelt-otherwise"),
        pytest.param("127.0.0.1", "203.0.113.007", "unknown", id="leading-zeros-are-ambiguous"),
        pytest.param("127.0.0.1", "203.0.113.7/8", "unknown", id="a-network"),
        pytest.param("127.0.0.1", "3405803783", "unknown", id="a-number"),
        pytest.param("::1", "2001:db8::1, 2001:db8:1::5", "2001:db8::1", id="ipv6-proxies"),
        pytest.param("::ffff:127.0.0.1", "203.0.113.7", "203.0.113.7", id="mapped-proxy"),
        pytest.param("::ffff:203.0.113.7", None, "203.0.113.7", id="mapped-client"),
        pytest.param("::ffff:127.0.0.1", None, "127.0.0.1", id="mapped-local"),
        pytest.param("127.0.0.1", "::ffff:203.0.113.7", "203.0.113.7", id="mapped-in-the-header"),
        pytest.param("fe80::1%eth0", None, "fe80::1%eth0", id="zone"),
        pytest.param("", None, "unix", id="unix"),
        pytest.param(None, None, "unix", id="nothing"),
        pytest.param("", "203.0.113.7", "203.0.113.7", id="unix-behind-a-proxy"),
        pytest.param("", "unknown", "unknown", id="unix-and-unknown"),
        pytest.param("weird", "203.0.113.7", "weird", id="no-address-is-no-proxy"),
    ],
)
def test_the_clients_address(peer: str | None, forwarded: str | None, address: str) -> None:
    environ = {"REMOTE_ADDR": peer, "HTTP_X_FORWARDED_FOR": forwarded}
    assert client_address({k: v for k, v in environ.items() if v is not None}, TRUSTING) == address


ADDRESSES = st.ip_addresses()


@given(ADDRESSES, st.lists(ADDRESSES, max_size=4), st.text(st.characters(codec="latin-1"), max_size=30))
def test_what_stands_left_of_the_client_decides_nothing(
    client: ipaddress.IPv4Address | ipaddress.IPv6Address,
    hops: list[ipaddress.IPv4Address | ipaddress.IPv6Address],
    written: str,
) -> None:
    """The reference: the rightmost of the addresses that is no proxy's."""
    chain = [*map(str, hops), "10.1.1.1"]
    plain = [getattr(hop, "ipv4_mapped", None) or hop for hop in (client, *hops)]
    strangers = [ip for ip in plain if not any(ip in network for network in TRUSTING.trusted_proxies)]
    address = client_address(
        {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": f"{written},{','.join([str(client), *chain])}"}, TRUSTING
    )
    if strangers:
        assert address == str(strangers[-1])


# --- pages of strangers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "host", "may"),
    [
        pytest.param(None, "relay.example", True, id="a-program"),
        pytest.param("https://relay.example", "relay.example", True, id="own-https"),
        pytest.param("http://relay.example", "relay.example", True, id="own-http"),
        pytest.param("http://localhost:8000", "localhost:8000", True, id="own-port"),
        pytest.param("https://relay.example", "relay.example:443", True, id="own-default-port-in-host"),
        pytest.param("https://relay.example:443", "relay.example", True, id="own-default-port-in-origin"),
        pytest.param("http://[::1]:8000", "[::1]:8000", True, id="own-ipv6"),
        pytest.param("https://RELAY.example", "relay.EXAMPLE", True, id="own-any-case"),
        pytest.param("https://listed.example", "relay.example", True, id="listed"),
        pytest.param("https://listed.example:8443", "relay.example", False, id="listed-other-port"),
        pytest.param("http://listed.example", "relay.example", False, id="listed-other-scheme"),
        pytest.param("https://evil.example", "relay.example", False, id="stranger"),
        pytest.param("https://relay.example.evil.example", "relay.example", False, id="longer-name"),
        pytest.param("https://evilrelay.example", "relay.example", False, id="name-that-ends-alike"),
        pytest.param("https://sub.relay.example", "relay.example", False, id="subdomain"),
        pytest.param("http://localhost:3000", "localhost:8000", False, id="other-port"),
        pytest.param("http://localhost", "localhost:8000", False, id="default-port-is-another"),
        pytest.param("https://relay.example", "relay.example:80", False, id="https-is-not-80"),
        pytest.param("https://relay.example@evil.example", "relay.example", False, id="user-info"),
        pytest.param("null", "relay.example", False, id="null"),
        pytest.param("null", "null", False, id="null-host"),
        pytest.param("", "relay.example", False, id="empty"),
        pytest.param("", "", False, id="both-empty"),
        pytest.param("https://", "", False, id="no-host"),
        pytest.param("relay.example", "relay.example", False, id="no-scheme"),
        pytest.param("//relay.example", "relay.example", False, id="no-scheme-but-slashes"),
        pytest.param("app://relay.example", "relay.example", False, id="an-apps-scheme"),
        pytest.param("chrome-extension://relay.example", "relay.example", False, id="an-extensions-scheme"),
        pytest.param("https://relay.example, https://evil.example", "relay.example", False, id="two"),
        pytest.param("https://evil.example, https://relay.example", "relay.example", False, id="two-own-last"),
        pytest.param("http://[::1", "relay.example", False, id="torn-bracket"),
        pytest.param("http://[x]", "relay.example", False, id="no-address-in-brackets"),
        pytest.param("http://relay.example:port", "relay.example", False, id="a-word-for-a-port"),
        pytest.param("http://relay.example:99999", "relay.example:99999", False, id="no-such-port"),
        pytest.param("http://relay.example", "[torn", False, id="torn-host"),
        pytest.param("https://relay.ex\xaample", "relay.example", False, id="latin-1"),
    ],
)
def test_only_its_own_pages_and_listed_ones_may_call(origin: str | None, host: str, may: bool) -> None:
    relay = settings(cors_origins="https://listed.example")
    environ = {"HTTP_HOST": host} if origin is None else {"HTTP_HOST": host, "HTTP_ORIGIN": origin}
    if may:
        check_origin(environ, relay)
        return
    with pytest.raises(errors.Forbidden) as caught:
        check_origin(environ, relay)
    assert caught.value.code == "origin_not_allowed"
    assert not origin or origin not in caught.value.message


@pytest.mark.parametrize(
    ("site", "origins", "may"),
    [
        pytest.param("cross-site", "", False, id="cross-site"),
        pytest.param("cross-site", "https://listed.example", False, id="cross-site-with-a-list"),
        pytest.param("cross-site", "*", True, id="cross-site-where-all-may"),
        pytest.param("same-origin", "", True, id="same-origin"),
        pytest.param("same-site", "", True, id="same-site"),
        pytest.param("none", "", True, id="typed-by-the-user"),
        pytest.param(None, "", True, id="a-program"),
    ],
)
def test_what_a_browser_marks_cross_site_is_refused(site: str | None, origins: str, may: bool) -> None:
    environ = {"HTTP_HOST": "relay.example"} | ({"HTTP_SEC_FETCH_SITE": site} if site else {})
    relay = settings(cors_origins=origins)
    if may:
        check_origin(environ, relay)
    else:
        with pytest.raises(errors.Forbidden):
            check_origin(environ, relay)


def test_where_all_origins_may_call_even_a_malformed_one_may() -> None:
    for origin in ("null", "https://evil.example", "http://[", ""):
        check_origin({"HTTP_ORIGIN": origin, "HTTP_SEC_FETCH_SITE": "cross-site"}, settings(cors_origins="*"))


@given(st.text(st.characters(codec="latin-1"), max_size=30), st.text(st.characters(codec="latin-1"), max_size=30))
def test_no_origin_and_no_host_is_an_error_of_the_relays(origin: str, host: str) -> None:
    environ = {"HTTP_ORIGIN": f"http://{origin}", "HTTP_HOST": host}
    for check in (check_origin, check_host):
        with contextlib.suppress(errors.Forbidden):
            check(environ, PLAIN)


# --- names that point here ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "may"),
    [
        pytest.param("localhost", True, id="localhost"),
        pytest.param("localhost:8000", True, id="port"),
        pytest.param("LocalHost:8000", True, id="case"),
        pytest.param("app.localhost:8000", True, id="subdomain"),
        pytest.param("127.0.0.1:8000", True, id="ipv4"),
        pytest.param("127.8.9.10", True, id="ipv4-of-the-block"),
        pytest.param("[::1]:8000", True, id="ipv6"),
        pytest.param("[::ffff:127.0.0.1]", True, id="mapped"),
        pytest.param("evil.example", False, id="a-name"),
        pytest.param("localhost.evil.example", False, id="begins-alike"),
        pytest.param("evillocalhost", False, id="ends-alike"),
        pytest.param("127.0.0.1.evil.example", False, id="begins-like-an-address"),
        pytest.param("127.0.0.1.nip.io", False, id="a-rebinding-service"),
        pytest.param("0.0.0.0:8000", False, id="any-address"),
        pytest.param("[::]:8000", False, id="any-address-ipv6"),
        pytest.param("10.0.0.1", False, id="private"),
        pytest.param("[::ffff:10.0.0.1]", False, id="mapped-private"),
        pytest.param("2130706433", False, id="a-number"),
        pytest.param("localhost@evil.example", False, id="user-info"),
        pytest.param("", False, id="empty"),
        pytest.param(None, False, id="none"),
        pytest.param("[::1", False, id="torn"),
        pytest.param("localhost:port", False, id="a-word-for-a-port"),
    ],
)
def test_without_keys_only_loopback_names_are_answered(host: str | None, may: bool) -> None:
    environ = {} if host is None else {"HTTP_HOST": host}
    check_host(environ, settings(client_keys="a-client-key-that-is-long"))
    check_host(environ, settings(allow_anonymous=True))
    if may:
        check_host(environ, PLAIN)
    else:
        with pytest.raises(errors.Forbidden) as caught:
            check_host(environ, PLAIN)
        assert caught.value.code == "host_not_allowed"


@pytest.mark.parametrize(
    ("address", "may"),
    [
        pytest.param("127.0.0.1", True, id="local"),
        pytest.param("127.9.9.9", True, id="local-block"),
        pytest.param("::1", True, id="local-ipv6"),
        pytest.param("::ffff:127.0.0.1", True, id="local-mapped"),
        pytest.param("unix", True, id="unix"),
        pytest.param("203.0.113.7", False, id="stranger"),
        pytest.param("10.0.0.1", False, id="private"),
        pytest.param("::ffff:203.0.113.7", False, id="stranger-mapped"),
        pytest.param("fe80::1%lo", False, id="link-local"),
        pytest.param("0.0.0.0", False, id="any-address"),
        pytest.param("unknown", False, id="unknown"),
        pytest.param("", False, id="empty"),
    ],
)
@pytest.mark.parametrize(
    "key",
    [
        pytest.param({"upstream_key": "sk-upstream"}, id="key"),
        pytest.param({"upstream_headers": '{"Authorization": "Bearer x"}'}, id="fixed-header"),
    ],
)
def test_without_client_keys_only_this_machine_spends_the_upstreams(
    key: dict[str, str], address: str, may: bool
) -> None:
    check_peer(address, PLAIN)
    check_peer(address, settings(**key, client_keys="a-client-key-that-is-long"))
    check_peer(address, settings(**key, allow_anonymous=True))
    if may:
        check_peer(address, settings(**key))
    else:
        with pytest.raises(errors.Forbidden) as caught:
            check_peer(address, settings(**key))
        assert caught.value.code == "address_not_allowed"
