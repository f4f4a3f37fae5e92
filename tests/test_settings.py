"""Settings: what each one takes, what is refused and how it is said, and that `.env.example` is true."""

from __future__ import annotations

import dataclasses
import io
import ipaddress
import re
import subprocess
import sys
from pathlib import Path

import certifi
import pytest
from dotenv import dotenv_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.settings import GROUPS, SETTINGS, Setting, Settings, SettingsError, loopback
from relay.wire.target import ALLOW_EVERYTHING, DEFAULT_ALLOW_WITH_KEY, allows

SENTINELS = "redis+sentinel://user:pw@[::1]:1,b.example:2/mymaster/3?socket_keepalive=yes"
ENV_EXAMPLE = (Path(__file__).parent.parent / ".env.example").read_text(encoding="utf-8")
UPSTREAM = {"RELAY_UPSTREAM_URL": "https://api.example/v1"}
BY_NAME = {setting.name: setting for setting in SETTINGS}


def outcome(mapping: dict[str, object], *, service: bool = False) -> Settings | SettingsError:
    try:
        return Settings.from_mapping(mapping, service=service)
    except SettingsError as error:
        return error


def value_of(name: str, value: object) -> object:
    """What `name` = `value` comes to in a mounted relay."""
    return getattr(Settings.from_mapping({**UPSTREAM, name: value}), BY_NAME[name].attribute)


def faults_of(mapping: dict[str, object], *, service: bool = False) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_mapping(mapping, service=service)
    assert str(caught.value).splitlines()[1:] == [f"  {fault}" for fault in caught.value.faults]
    return caught.value.faults


def fault_of(name: str, value: object) -> str:
    """The one fault of `name` = `value` in a mounted relay."""
    (fault,) = faults_of({**UPSTREAM, name: value})
    assert fault.startswith(f"{name} = ")
    return fault


# --- the table ----------------------------------------------------------------------------------------------------


def test_every_setting_is_an_attribute_and_the_other_way_round() -> None:
    assert [setting.attribute for setting in SETTINGS] == [field.name for field in dataclasses.fields(Settings)]
    assert [setting for _, group in GROUPS for setting in group] == list(SETTINGS)


@pytest.mark.parametrize(
    "setting", [setting for setting in SETTINGS if setting.name not in UPSTREAM], ids=lambda setting: setting.name
)
def test_not_set_is_none_and_the_same_as_the_table_s_default(setting: Setting) -> None:
    unset = getattr(Settings.from_mapping(UPSTREAM), setting.attribute)
    assert value_of(setting.name, None) == unset
    assert unset == (None if setting.none_if_unset else value_of(setting.name, setting.default))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_says_in_one_line_what_it_means_and_takes(setting: Setting) -> None:
    for text in (setting.meaning, setting.allowed):
        assert text
        assert text.isprintable()
        assert "|" not in text  # it goes into a Markdown table


# --- values -------------------------------------------------------------------------------------------------------

CONTAINED = ipaddress.ip_network("10.0.0.0/8")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        pytest.param("RELAY_HEARTBEAT", "15", 15.0, id="plain-seconds"),
        pytest.param("RELAY_HEARTBEAT", "0.5", 0.5, id="fraction"),
        pytest.param("RELAY_HEARTBEAT", ".5", 0.5, id="fraction-without-zero"),
        pytest.param("RELAY_HEARTBEAT", "500ms", 0.5, id="milliseconds"),
        pytest.param("RELAY_HEARTBEAT", " 15 s ", 15.0, id="seconds-with-spaces"),
        pytest.param("RELAY_HEARTBEAT", "2M", 120.0, id="minutes"),
        pytest.param("RELAY_HEARTBEAT", "1h", 3600.0, id="hour"),
        pytest.param("RELAY_HEARTBEAT", 15, 15.0, id="int"),
        pytest.param("RELAY_HEARTBEAT", 0.25, 0.25, id="float"),
        pytest.param("RELAY_HEARTBEAT", "0", 0.0, id="off"),
        pytest.param("RELAY_HEARTBEAT", "0s", 0.0, id="off-with-unit"),
        pytest.param("RELAY_HEARTBEAT", "", 0.0, id="empty-is-off"),
        pytest.param("RELAY_BUFFER", "65536", 65536, id="bytes"),
        pytest.param("RELAY_BUFFER", "64KiB", 65536, id="kib"),
        pytest.param("RELAY_BUFFER", "64k", 65536, id="k"),
        pytest.param("RELAY_BUFFER", "64 kb", 64000, id="kb"),
        pytest.param("RELAY_BUFFER", "1.5MiB", 1572864, id="fraction-of-mib"),
        pytest.param("RELAY_BUFFER", "2M", 2097152, id="m"),
        pytest.param("RELAY_BUFFER", "1MB", 1000000, id="mb"),
        pytest.param("RELAY_MAX_BODY", "1GiB", 2**30, id="gib"),
        pytest.param("RELAY_MAX_BODY", 1024, 1024, id="size-as-int"),
        pytest.param("RELAY_MAX_STREAMS", "900", 900, id="count"),
        pytest.param("RELAY_MAX_STREAMS", "", None, id="count-not-set"),
        pytest.param("RELAY_MAX_STREAMS_PER_CLIENT", "", 0, id="count-off"),
        pytest.param("RELAY_TRANSPARENT", "on", True, id="on"),
        pytest.param("RELAY_TRANSPARENT", "True", True, id="true"),
        pytest.param("RELAY_TRANSPARENT", "1", True, id="one"),
        pytest.param("RELAY_TRANSPARENT", "", False, id="empty-is-off-too"),
        pytest.param("RELAY_TRANSPARENT", True, True, id="bool"),
        pytest.param("RELAY_TRANSPARENT", 0, False, id="zero"),
        pytest.param("RELAY_UPSTREAM_URL", "http://h", "http://h", id="url"),
        pytest.param(
            "RELAY_UPSTREAM_URL", "HTTPS://API.Example:8443/v1//", "https://api.example:8443/v1", id="url-norm"
        ),
        pytest.param("RELAY_UPSTREAM_URL", "http://[::1]:8080/v1/", "http://[::1]:8080/v1", id="url-ipv6"),
        pytest.param("RELAY_UPSTREAM_URL", "http://my_service:80", "http://my_service:80", id="url-of-compose"),
        pytest.param("RELAY_UPSTREAM_URL", "https://h/a%2Fb;c", "https://h/a%2Fb;c", id="url-path-kept"),
        pytest.param("RELAY_UPSTREAM_KEY", "sk-ü~", "sk-ü~", id="key"),
        pytest.param("RELAY_UPSTREAM_KEY", "", None, id="no-key"),
        pytest.param("RELAY_UPSTREAM_HEADERS", '{"a": "1", "B": ""}', (("a", "1"), ("B", "")), id="headers"),
        pytest.param("RELAY_UPSTREAM_HEADERS", {"a": "1"}, (("a", "1"),), id="headers-as-dict"),
        pytest.param("RELAY_UPSTREAM_HEADERS", "{}", (), id="no-headers"),
        pytest.param("RELAY_UPSTREAM_QUERY", "a=b&c", "a=b&c", id="query"),
        pytest.param("RELAY_UPSTREAM_CA", certifi.where(), certifi.where(), id="ca"),
        pytest.param("RELAY_UPSTREAM_CA", Path(certifi.where()), certifi.where(), id="ca-as-path"),
        pytest.param("RELAY_UPSTREAM_PROXY", "http://u:p%40@proxy:3128/", "http://u:p%40@proxy:3128", id="proxy"),
        pytest.param("RELAY_MOUNT", "/", "", id="mount-at-the-root"),
        pytest.param("RELAY_MOUNT", "/ai/v1/", "/ai/v1", id="mount"),
        pytest.param("RELAY_MOUNT", "/api/v1", "/api/v1", id="mount-beside-api"),
        pytest.param("RELAY_MOUNT", "/healthy", "/healthy", id="mount-like-health"),
        pytest.param("RELAY_ALLOW", "", ALLOW_EVERYTHING, id="allow-by-default"),
        pytest.param("RELAY_ALLOW", "*", ALLOW_EVERYTHING, id="allow-everything"),
        pytest.param("RELAY_MODELS", "a, b,,a", frozenset({"a", "b"}), id="models"),
        pytest.param("RELAY_MODELS", ["a", "b"], frozenset({"a", "b"}), id="models-as-list"),
        pytest.param("RELAY_MODELS", "", None, id="any-model"),
        pytest.param("RELAY_CLIENT_KEYS", "k2, k1,k2", ("k2", "k1"), id="client-keys"),
        pytest.param("RELAY_CLIENT_KEYS", {"k2", "k1"}, ("k1", "k2"), id="client-keys-as-set"),
        pytest.param("RELAY_TRUSTED_PROXIES", "10.0.0.0/8", (CONTAINED,), id="network"),
        pytest.param("RELAY_TRUSTED_PROXIES", ["10.0.0.0/8"], (CONTAINED,), id="network-in-a-list"),
        pytest.param("RELAY_TRUSTED_PROXIES", "::1", (ipaddress.ip_network("::1"),), id="address"),
        pytest.param("RELAY_TRUSTED_PROXIES", "", (), id="no-proxy"),
        pytest.param("RELAY_DROP_HEADERS", "X-A, x-b", frozenset({"x-a", "x-b"}), id="header-names"),
        pytest.param("RELAY_CORS_ORIGINS", "HTTPS://A.b:8443,*", ("https://a.b:8443", "*"), id="origins"),
        pytest.param("RELAY_CORS_ORIGINS", "https://a:443,http://a:80", ("https://a", "http://a"), id="default-ports"),
        pytest.param("RELAY_CORS_ORIGINS", "http://[::1]:3000", ("http://[::1]:3000",), id="origin-ipv6"),
        pytest.param("RELAY_RATE_LIMIT", "60/minute", "60/minute", id="rate"),
        pytest.param("RELAY_RATE_LIMIT", "10 per 2 hours; 1/second", "10 per 2 hours; 1/second", id="rates"),
        pytest.param("RELAY_RATE_LIMIT", "", None, id="no-rate"),
        pytest.param("RELAY_LIMITS_URL", "redis://:pw@h:6379/0", "redis://:pw@h:6379/0", id="redis"),
        pytest.param("RELAY_LIMITS_URL", SENTINELS, SENTINELS, id="sentinels"),
        pytest.param("RELAY_LIMITS_URL", "rediss+cluster://a,b:7000", "rediss+cluster://a,b:7000", id="cluster"),
        pytest.param("RELAY_HEALTH_PATH", "/models?limit=1", "models?limit=1", id="health-path"),
        pytest.param("RELAY_HEALTH_PATH", "", "", id="the-base-itself"),
        pytest.param("RELAY_BIND", "[::]:80", "[::]:80", id="bind-ipv6"),
        pytest.param("RELAY_BIND", "unix:/run/relay.sock", "unix:/run/relay.sock", id="bind-unix"),
        pytest.param("RELAY_ADMIN_BIND", "", None, id="no-admin"),
    ],
)
def test_a_value_comes_to_what_the_table_says(name: str, text: object, value: object) -> None:
    found = value_of(name, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        pytest.param("RELAY_HEARTBEAT", "-3", "from 10ms to 1h", id="negative"),
        pytest.param("RELAY_HEARTBEAT", "0.001", "from 10ms to 1h", id="too-short"),
        pytest.param("RELAY_HEARTBEAT", "2h", "from 10ms to 1h", id="too-long"),
        pytest.param("RELAY_HEARTBEAT", "nan", "from 10ms to 1h", id="nan"),
        pytest.param("RELAY_HEARTBEAT", float("nan"), "from 10ms to 1h", id="nan-float"),
        pytest.param("RELAY_HEARTBEAT", float("inf"), "from 10ms to 1h", id="infinity"),
        pytest.param("RELAY_HEARTBEAT", "1e3", "from 10ms to 1h", id="exponent"),
        pytest.param("RELAY_HEARTBEAT", "1_0", "from 10ms to 1h", id="underscore"),
        pytest.param("RELAY_HEARTBEAT", "\u0661\u0665", "from 10ms to 1h", id="other-digits"),
        pytest.param("RELAY_HEARTBEAT", "15 apples", "from 10ms to 1h", id="unknown-unit"),
        pytest.param("RELAY_HEARTBEAT", "15KiB", "from 10ms to 1h", id="a-size-for-a-time"),
        pytest.param("RELAY_HEARTBEAT", True, "not bool", id="bool-for-a-time"),
        pytest.param("RELAY_HEARTBEAT", 10**5000, "from 10ms to 1h", id="huge"),
        pytest.param("RELAY_HEARTBEAT", "9" * 5000, "from 10ms to 1h", id="huge-text"),
        pytest.param("RELAY_CONNECT_TIMEOUT", "0", "from 10ms to 5m", id="no-off-for-connect"),
        pytest.param("RELAY_CONNECT_TIMEOUT", "", "from 10ms to 5m", id="no-empty-for-connect"),
        pytest.param("RELAY_FIRST_BYTE_TIMEOUT", 0, "from 10ms to 24h", id="no-off-for-first-byte"),
        pytest.param("RELAY_BUFFER", "10", "from 1KiB to 1GiB", id="too-small"),
        pytest.param("RELAY_BUFFER", "10s", "from 1KiB to 1GiB", id="a-time-for-a-size"),
        pytest.param("RELAY_BUFFER", 2048.5, "whole bytes", id="half-a-byte"),
        pytest.param("RELAY_MAX_STREAMS", "0", "from 1 to 100000", id="no-streams"),
        pytest.param("RELAY_MAX_STREAMS", "1.5", "from 1 to 100000", id="half-a-stream"),
        pytest.param("RELAY_TRANSPARENT", "maybe", "on or off", id="no-switch"),
        pytest.param("RELAY_TRANSPARENT", 2, "on or off", id="number-for-a-switch"),
        pytest.param("RELAY_UPSTREAM_URL", "api.openai.com/v1", "did you mean https://api.openai.com/v1?", id="scheme"),
        pytest.param("RELAY_UPSTREAM_URL", "localhost:8080/v1", "did you mean http://localhost:8080/v1?", id="here"),
        pytest.param("RELAY_UPSTREAM_URL", "ftp://h", "an http:// or https:// URL", id="ftp"),
        pytest.param("RELAY_UPSTREAM_URL", "https://", "an http:// or https:// URL", id="no-host"),
        pytest.param("RELAY_UPSTREAM_URL", "https:/h", "an http:// or https:// URL", id="one-slash"),
        pytest.param("RELAY_UPSTREAM_URL", "https://h:99999", "an http:// or https:// URL", id="port"),
        pytest.param("RELAY_UPSTREAM_URL", "https://h:0", "an http:// or https:// URL", id="port-zero"),
        pytest.param("RELAY_UPSTREAM_URL", "http://256.1.1.1", "an http:// or https:// URL", id="no-address"),
        pytest.param("RELAY_UPSTREAM_URL", "http://[foo]", "an http:// or https:// URL", id="no-ipv6"),
        pytest.param("RELAY_UPSTREAM_URL", "https://h/a b", "an http:// or https:// URL", id="space"),
        pytest.param("RELAY_UPSTREAM_URL", "https://münchen.example", "an http:// or https:// URL", id="not-ascii"),
        pytest.param("RELAY_UPSTREAM_URL", "https://h/v1/../x", "without . or .. segments", id="dots"),
        pytest.param("RELAY_UPSTREAM_URL", 5, "not int", id="type"),
        pytest.param("RELAY_UPSTREAM_KEY_HEADER", "Host", "a header's name", id="key-in-host"),
        pytest.param("RELAY_UPSTREAM_KEY_HEADER", "", "may not be empty", id="no-key-header"),
        pytest.param("RELAY_UPSTREAM_QUERY", "?a=b", "without the question mark", id="question-mark"),
        pytest.param("RELAY_UPSTREAM_QUERY", "a=b c", "percent-encoded", id="space-in-query"),
        pytest.param("RELAY_UPSTREAM_CA", "/no/such/file", "No such file", id="no-file"),
        pytest.param("RELAY_UPSTREAM_CA", "/", "Is a directory", id="folder"),
        pytest.param("RELAY_UPSTREAM_CA", __file__, "no PEM certificate", id="no-certificate"),
        pytest.param("RELAY_UPSTREAM_CA", "a\0b", "not a usable file name", id="no-file-name"),
        pytest.param("RELAY_UPSTREAM_PROXY", "socks5://h:1", "http:// or https://", id="socks"),
        pytest.param("RELAY_UPSTREAM_PROXY", "http://h:1/path", "without a path", id="proxy-path"),
        pytest.param("RELAY_MOUNT", "v1", "did you mean /v1?", id="mount-without-slash"),
        pytest.param("RELAY_MOUNT", "", "may not be empty", id="no-mount"),
        pytest.param("RELAY_MOUNT", "/a/../b", "letters, digits", id="mount-with-dots"),
        pytest.param("RELAY_MOUNT", "/a//b", "letters, digits", id="mount-with-two-slashes"),
        pytest.param("RELAY_MOUNT", "/<path:x>", "letters, digits", id="mount-with-a-converter"),
        *(
            pytest.param("RELAY_MOUNT", path, "the relay's own", id=f"mount{path.replace('/', '-')}")
            for path in ("/health", "/health/x", "/metrics", "/chat", "/stream", "/api", "/ticket", "/chat/stream/")
        ),
        pytest.param("RELAY_ALLOW", "GET a, chat", "'chat' is not METHOD path", id="allow"),
        pytest.param("RELAY_MODELS", " , ", "nothing between its commas", id="commas-only"),
        pytest.param("RELAY_CLIENT_KEYS", ",", "nothing between its commas", id="no-key-between-commas"),
        pytest.param("RELAY_MODELS", 5, "a text or a list", id="models"),
        pytest.param("RELAY_CHAT_MODEL", "", "may not be empty", id="no-chat-model"),
        pytest.param("RELAY_TRUSTED_PROXIES", "10.1.0.0/8", "did you mean 10.0.0.0/8?", id="host-bits"),
        pytest.param("RELAY_TRUSTED_PROXIES", "nginx", "addresses or networks", id="name-for-a-network"),
        pytest.param("RELAY_DROP_HEADERS", "X-Shop-*", "no wildcards", id="wildcard"),
        pytest.param("RELAY_DROP_HEADERS", "X Shop", "not a header's name", id="no-header-name"),
        *(
            pytest.param("RELAY_PASS_HEADERS", name, f"may not contain {name.lower()}", id=f"pass-{name}")
            for name in (
                *("Authorization", "Cookie", "X-Auth-Token", "X-Session-Id", "X-Token", "X-Amz-Security-Token"),
                *(
                    "X-Forwarded-Host",
                    "X-Forwarded-Prefix",
                    "X-Forwarded-Path",
                    "X-Forwarded-Uri",
                    "X-Forwarded-Method",
                ),
                *("baggage", "X-Amzn-Oidc-Data", "X-MS-Client-Principal", "X-MS-Client-Principal-Name"),
                *("X-MS-Token-AAD-Id-Token", "X-Portkey-API-Key", "Ocp-Apim-Subscription-Key", "X-Matched-Path"),
            )
        ),
        pytest.param("RELAY_CORS_ORIGINS", "https://h/", "did you mean https://h?", id="origin-with-slash"),
        pytest.param("RELAY_CORS_ORIGINS", "h.example", "is no origin", id="origin-without-scheme"),
        pytest.param("RELAY_CORS_ORIGINS", "null", "is no origin", id="null"),
        pytest.param("RELAY_RATE_LIMIT", "60", "60/minute", id="rate-without-time"),
        pytest.param("RELAY_RATE_LIMIT", "0/minute", "60/minute", id="rate-of-none"),
        pytest.param("RELAY_RATE_LIMIT", "60/fortnight", "60/minute", id="rate-unit"),
        pytest.param("RELAY_LIMITS_URL", "memory", "memory://", id="limits"),
        pytest.param("RELAY_LIMITS_URL", "mysql://h", "redis://", id="limits-scheme"),
        pytest.param("RELAY_LIMITS_URL", "redis+sentinel://a:1,b:2/", "the name of the master", id="no-master"),
        pytest.param("RELAY_LIMITS_URL", "redis+sentinel://a/name/x", "no number", id="sentinel-database"),
        pytest.param("RELAY_LIMITS_URL", "redis+cluster://a:1/1", "names a database", id="cluster-database"),
        pytest.param("RELAY_LIMITS_URL", "redis+cluster://a:1,b:x", "redis+cluster://", id="cluster-port"),
        pytest.param("RELAY_LIMITS_URL", "redis+cluster://a:1,,b:2", "redis+cluster://", id="cluster-host"),
        pytest.param("RELAY_HEALTH_PATH", "../admin", "below the upstream URL", id="health-path-dots"),
        pytest.param("RELAY_HEALTH_PATH", "http://h/models", "below the upstream URL", id="health-path-url"),
        pytest.param("RELAY_BIND", "8000", "host:port", id="port-alone"),
        pytest.param("RELAY_BIND", ":8000", "host:port", id="no-bind-host"),
        pytest.param("RELAY_BIND", "127.0.0.1:0", "host:port", id="bind-port-zero"),
        pytest.param("RELAY_BIND", "::1:80", "host:port", id="ipv6-without-brackets"),
        pytest.param("RELAY_BIND", "1.2.3:80", "host:port", id="three-numbers"),
        pytest.param("RELAY_BIND", "unix:relay.sock", "unix:/path/to/it", id="relative-socket"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(name: str, value: object, says: str) -> None:
    assert says in fault_of(name, value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        pytest.param("RELAY_UPSTREAM_URL", "https://user:S3CRET@h/v1", "no credentials", id="url-credentials"),
        pytest.param("RELAY_UPSTREAM_URL", "user:S3CRET@h/v1", "no credentials", id="credentials-without-scheme"),
        pytest.param("RELAY_UPSTREAM_URL", "https://h/v1?key=S3CRET", "no query", id="url-query"),
        pytest.param("RELAY_UPSTREAM_KEY", "S3CRET\n", "must not contain", id="key-newline"),
        pytest.param("RELAY_UPSTREAM_KEY", "S3CRET x", "must not contain", id="key-space"),
        pytest.param("RELAY_UPSTREAM_KEY", "S3CRET…", "must not contain", id="key-beyond-latin-1"),
        pytest.param("RELAY_UPSTREAM_KEY", "Bearer S3CRET", "without the word Bearer", id="key-with-bearer"),
        pytest.param("RELAY_UPSTREAM_KEY", ["S3CRET"], "a key, as text", id="key-type"),
        pytest.param("RELAY_UPSTREAM_KEY_HEADER", "x-api-key: S3CRET", "a header's name", id="key-in-its-header"),
        pytest.param("RELAY_UPSTREAM_KEY_HEADER", "S3CRET\x01", "a header's name", id="key-header-control"),
        pytest.param("RELAY_UPSTREAM_HEADERS", {"a": " S3CRET"}, "outer spaces", id="header-outer-space"),
        pytest.param("RELAY_UPSTREAM_HEADERS", '{"a": "S3CRET\\n"}', "header 1 has control", id="header-newline"),
        pytest.param("RELAY_UPSTREAM_HEADERS", '{"a": "S3CRET …"}', "beyond latin-1", id="header-beyond-latin-1"),
        pytest.param("RELAY_UPSTREAM_HEADERS", '{"a: S3CRET": ""}', "not a header's name", id="header-name"),
        pytest.param("RELAY_UPSTREAM_HEADERS", '{"a": "S3CRET", "A": ""}', "repeats a name", id="header-twice"),
        pytest.param("RELAY_UPSTREAM_HEADERS", '{"a": ["S3CRET"]}', "must have a text", id="header-list"),
        pytest.param("RELAY_UPSTREAM_HEADERS", '{"a": {"b": "S3CRET"}}', "must have a text", id="header-object"),
        pytest.param("RELAY_UPSTREAM_HEADERS", '[["a", "S3CRET"]]', "a JSON object", id="json-list"),
        pytest.param("RELAY_UPSTREAM_HEADERS", '{"a": "S3CRET"', "a JSON object", id="json-open"),
        pytest.param("RELAY_UPSTREAM_HEADERS", '{"a": ' * 100_000, "a JSON object", id="json-deep"),
        pytest.param("RELAY_UPSTREAM_HEADERS", '\'{"a": "S3CRET"}\'', "quotes around it", id="json-in-quotes"),
        pytest.param("RELAY_UPSTREAM_HEADERS", {"a": 53}, "must have a text", id="header-number"),
        pytest.param("RELAY_UPSTREAM_HEADERS", ["S3CRET"], "a JSON object", id="header-type"),
        *(
            pytest.param("RELAY_UPSTREAM_HEADERS", {name: "S3CRET"}, f"may not contain {name}", id=f"header-{name}")
            for name in ("Host", "content-length", "Connection", "Transfer-Encoding", "TE", "Upgrade", "Keep-Alive")
        ),
        pytest.param("RELAY_UPSTREAM_QUERY", "key=S3CRET#", "a query", id="query-fragment"),
        pytest.param("RELAY_UPSTREAM_PROXY", "u:S3CRET@proxy:3128", "http:// or https://", id="proxy"),
        pytest.param("RELAY_CLIENT_KEYS", "ok,S3CRET x", "key 2 has a space", id="client-key-space"),
        pytest.param("RELAY_CLIENT_KEYS", "ok,@S3CRET", "must stand alone", id="client-key-file-in-a-list"),
        pytest.param("RELAY_CLIENT_KEYS", "@/S3CRET", "No such file", id="client-key-file"),
        pytest.param("RELAY_LIMITS_URL", "mysql://u:S3CRET@h", "redis://", id="limits"),
    ],
)
def test_a_fault_of_a_secret_does_not_show_it(name: str, value: object, says: str) -> None:
    fault = fault_of(name, value)
    assert says in fault
    assert f"{name} = (not shown): " in fault
    assert "S3CRET" not in fault


TYPED = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.lists(st.text()),
    st.dictionaries(st.text(), st.text()),
)


@given(st.dictionaries(st.sampled_from([setting.name for setting in SETTINGS]), TYPED), st.booleans())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_values_give_settings_or_one_error_of_one_line_each(mapping: dict[str, object], service: bool) -> None:
    found = outcome(mapping, service=service)
    if isinstance(found, SettingsError):
        assert found.faults
        assert str(found).split("\n")[1:] == [f"  {fault}" for fault in found.faults]
        assert all(fault.isprintable() for fault in found.faults)


SECRET = "Zq7-hush-Zq7"
AROUND = st.text(max_size=6)


@given(st.sampled_from([setting.name for setting in SETTINGS if setting.secret]), AROUND, AROUND, st.booleans())
def test_no_secret_is_ever_in_a_message_or_a_repr(name: str, before: str, after: str, service: bool) -> None:
    for value in (
        f"{before}{SECRET}{after}",
        f'{{"x{before}": "{SECRET}{after}"}}',
        f"http://user:{SECRET}{after}@proxy{before}",
        f"redis://:{SECRET}@{before}{after}",
        f"@{before}{SECRET}",
        f"Bearer {SECRET}{after}",
    ):
        mapping: dict[str, object] = {**UPSTREAM, name: value, "RELAY_BIND": "0.0.0.0:80"}
        for found in (outcome(mapping, service=service), outcome({**mapping, "RELAY_HEARTBEAT": "x"}, service=service)):
            assert SECRET not in str(found)
            assert SECRET not in repr(found)
            assert not isinstance(found, SettingsError) or found.__context__ is None


def test_the_repr_tells_set_from_unset_and_shows_the_rest() -> None:
    shown = repr(Settings.from_mapping({**UPSTREAM, "RELAY_UPSTREAM_KEY": "sk-1"}))
    assert "upstream_key=(not shown), " in shown
    assert "upstream_proxy=None, " in shown
    assert "upstream_url='https://api.example/v1', " in shown


# --- durations and sizes as text ----------------------------------------------------------------------------------


@given(st.integers(10, 3_600_000))
def test_milliseconds_and_seconds_are_the_same_time(milliseconds: int) -> None:
    from_unit, from_plain = (
        value_of("RELAY_HEARTBEAT", text) for text in (f"{milliseconds}ms", f"{milliseconds / 1000:.3f}")
    )
    assert from_unit == pytest.approx(milliseconds / 1000)
    assert from_plain == pytest.approx(from_unit)


@given(st.integers(1, 2**20))
def test_a_size_is_the_same_in_every_unit(kibibytes: int) -> None:
    sizes = {value_of("RELAY_BUFFER", text) for text in (f"{kibibytes}KiB", f"{kibibytes}k", str(kibibytes * 1024))}
    assert sizes == {kibibytes * 1024}


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        pytest.param("RELAY_HARTBEAT", "RELAY_HEARTBEAT", id="typing-error"),
        pytest.param("RELAY_UPSTREAM", "RELAY_UPSTREAM_URL", id="half-the-name"),
        pytest.param("RELAY_Upstream_Url", "RELAY_UPSTREAM_URL", id="case"),
        pytest.param("RELAY_PORTAL", None, id="nothing-like-it"),
        pytest.param("RELAY_", None, id="prefix-alone"),
    ],
)
def test_an_unknown_name_is_a_fault_with_a_suggestion(name: str, meant: str | None) -> None:
    (fault,) = faults_of({**UPSTREAM, name: "S3CRET"})
    assert fault.startswith(f"{name}: no such setting")
    assert (f"did you mean {meant}?" in fault) is (meant is not None)
    assert "S3CRET" not in fault


def test_what_kubernetes_injects_and_names_of_others_are_ignored() -> None:
    injected = {
        "RELAY_PORT": "tcp://10.0.0.1:80",
        "RELAY_PORT_80_TCP_ADDR": "10.0.0.1",
        "RELAY_SERVICE_HOST": "10.0.0.1",
        "RELAY_SERVICE_PORT_HTTP": "80",
    }
    others = {"RELAYED": "x", "relay_heartbeat": "x", "SECRET_KEY": b"x", "PORT": "nonsense"}
    assert Settings.from_mapping({**UPSTREAM, **injected, **others}) == Settings.from_mapping(UPSTREAM)


def test_one_message_lists_every_fault() -> None:
    mapping = {"RELAY_HEARTBEAT": "x", "RELAY_MOUNT": "v1", "RELAY_HOOLD": "1", "RELAY_BUFFER": -1}
    with pytest.raises(SettingsError) as caught:
        Settings.from_mapping(mapping)
    message = str(caught.value)
    assert message.startswith("5 settings are wrong:\n")
    for name in (*mapping, "RELAY_UPSTREAM_URL is not set"):
        assert f"\n  {name}" in message
    assert "did you mean RELAY_HOLD?" in message


# --- files --------------------------------------------------------------------------------------------------------


def test_client_keys_come_from_a_file_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes("\ufeff# of the shop\nkey,1\r\n\n  key2  \nkey2\n#key3\n".encode())
    assert value_of("RELAY_CLIENT_KEYS", f"@{file}") == ("key,1", "key2")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "holds no key", id="empty"),
        pytest.param(b"\n# none yet\n", "holds no key", id="comments-only"),
        pytest.param(b"\xff\xfe", "not UTF-8", id="not-utf-8"),
        pytest.param(b"ok\nS3CRET x\n", "key 2 has a space", id="space"),
    ],
)
def test_a_file_without_sound_keys_is_a_fault(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    fault = fault_of("RELAY_CLIENT_KEYS", f"@{file}")
    assert says in fault
    assert "S3CRET" not in fault


# --- rules between settings ---------------------------------------------------------------------------------------


def test_with_an_upstream_key_only_inference_is_allowed_unless_said_otherwise() -> None:
    key = {**UPSTREAM, "RELAY_UPSTREAM_KEY": "sk-1"}
    assert Settings.from_mapping(UPSTREAM).allow == ALLOW_EVERYTHING
    assert Settings.from_mapping(key).allow == DEFAULT_ALLOW_WITH_KEY
    assert Settings.from_mapping({**key, "RELAY_ALLOW": ""}).allow == DEFAULT_ALLOW_WITH_KEY
    assert Settings.from_mapping({**key, "RELAY_ALLOW": "*"}).allow == ALLOW_EVERYTHING
    listed = Settings.from_mapping({**key, "RELAY_ALLOW": ["POST a", "GET b/*"]}).allow
    assert allows(listed, "HEAD", "b/c")
    assert not allows(listed, "POST", "chat/completions")


@pytest.mark.parametrize(
    ("extra", "adds"),
    [
        pytest.param({}, False, id="nothing"),
        pytest.param({"RELAY_UPSTREAM_KEY": "k"}, True, id="the-key"),
        pytest.param({"RELAY_UPSTREAM_HEADERS": '{"AUTHORIZATION": "Basic x"}'}, True, id="in-a-header"),
        pytest.param({"RELAY_UPSTREAM_HEADERS": '{"anthropic-version": "x"}'}, False, id="other-header"),
        pytest.param({"RELAY_UPSTREAM_QUERY": "alt=sse&key=AIza"}, True, id="in-the-query"),
        pytest.param({"RELAY_UPSTREAM_QUERY": "api-version=2024-10-21"}, False, id="other-query"),
    ],
)
def test_a_key_counts_wherever_it_stands(extra: dict[str, str], adds: bool) -> None:
    """A key among the fixed headers is guarded like RELAY_UPSTREAM_KEY: by the paths and by who may connect."""
    found = Settings.from_mapping({**UPSTREAM, **extra})
    assert found.adds_key is adds
    assert found.allow == (DEFAULT_ALLOW_WITH_KEY if adds else ALLOW_EVERYTHING)
    abroad: dict[str, object] = {**UPSTREAM, **extra, "RELAY_BIND": "0.0.0.0:80"}
    if adds:
        assert "RELAY_CLIENT_KEYS" in faults_of(abroad, service=True)[0]
    else:
        Settings.from_mapping(abroad, service=True)


def test_the_key_is_not_set_twice() -> None:
    mapping = {**UPSTREAM, "RELAY_UPSTREAM_KEY": "a", "RELAY_UPSTREAM_HEADERS": '{"authorization": "S3CRET"}'}
    (fault,) = faults_of({**mapping})
    assert "keep one of the two" in fault
    assert "S3CRET" not in fault


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"RELAY_CLIENT_KEYS": "k"}, id="client-keys"),
        pytest.param({"RELAY_ALLOW_ANONYMOUS": "on"}, id="anonymous-on-purpose"),
        pytest.param({"RELAY_BIND": "127.0.0.1:80"}, id="loopback"),
        pytest.param({"RELAY_BIND": "unix:/run/relay.sock"}, id="unix-socket"),
    ],
)
def test_the_service_keeps_its_key_from_strangers_and_names_the_ways_out(extra: dict[str, str]) -> None:
    mapping: dict[str, object] = {**UPSTREAM, "RELAY_UPSTREAM_KEY": "sk-1", "RELAY_BIND": "0.0.0.0:80"}
    (fault,) = faults_of(mapping, service=True)
    for way in ("RELAY_CLIENT_KEYS", "127.0.0.1", "RELAY_ALLOW_ANONYMOUS"):
        assert way in fault
    Settings.from_mapping({**mapping, **extra}, service=True)
    Settings.from_mapping(mapping)  # a mounted relay has its shop's own guard


def test_a_fault_in_the_client_keys_is_not_told_as_there_being_none() -> None:
    mapping = {**UPSTREAM, "RELAY_UPSTREAM_KEY": "k", "RELAY_BIND": "0.0.0.0:80", "RELAY_CLIENT_KEYS": "a b"}
    (fault,) = faults_of({**mapping}, service=True)
    assert fault.startswith("RELAY_CLIENT_KEYS")


def test_without_an_upstream_there_is_the_demo_for_this_machine_only() -> None:
    demo = Settings.from_mapping({}, service=True)
    assert (demo.upstream_url, demo.upstream_host) == (None, "demo")
    Settings.from_mapping({"RELAY_BIND": "unix:/run/relay.sock"}, service=True)
    for abroad in ({"RELAY_BIND": "0.0.0.0:80"}, {"PORT": "80"}):
        assert "RELAY_UPSTREAM_URL is not set" in faults_of({**abroad}, service=True)[0]
    assert "set it to the upstream's base URL" in faults_of({})[0]


@pytest.mark.parametrize(
    ("mapping", "bind"),
    [
        pytest.param({}, "127.0.0.1:8000", id="neither"),
        pytest.param({"PORT": "5000"}, "0.0.0.0:5000", id="port"),
        pytest.param({"PORT": 5000}, "0.0.0.0:5000", id="port-as-int"),
        pytest.param({"PORT": "5000", "RELAY_BIND": None}, "0.0.0.0:5000", id="port-and-none"),
        pytest.param({"PORT": ""}, "127.0.0.1:8000", id="empty-port"),
        pytest.param({"PORT": "5000", "RELAY_BIND": "127.0.0.1:80"}, "127.0.0.1:80", id="both"),
        pytest.param({"PORT": "nonsense", "RELAY_BIND": "127.0.0.1:80"}, "127.0.0.1:80", id="port-not-needed"),
    ],
)
def test_the_service_listens_where_its_platform_says(mapping: dict[str, object], bind: str) -> None:
    assert Settings.from_mapping({**UPSTREAM, **mapping}, service=True).bind == bind
    assert Settings.from_mapping({**UPSTREAM, "PORT": "5000"}).bind == "127.0.0.1:8000"


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x", "8" * 5000])
def test_a_port_that_is_none_is_a_fault(port: str) -> None:
    (fault,) = faults_of({**UPSTREAM, "PORT": port}, service=True)
    assert fault.startswith("PORT = ")
    assert len(fault) < 200


@pytest.mark.parametrize(
    ("bind", "admin", "clashes"),
    [
        pytest.param("127.0.0.1:1", "127.0.0.1:2", False, id="two-ports"),
        pytest.param("127.0.0.1:1", "127.0.0.1:1", True, id="the-same"),
        pytest.param("0.0.0.0:1", "127.0.0.1:1", True, id="everywhere-and-here"),
        pytest.param("localhost:1", "127.0.0.1:1", True, id="two-names"),
        pytest.param("10.0.0.1:1", "127.0.0.1:1", False, id="two-hosts"),
        pytest.param("unix:/a", "unix:/b", False, id="two-sockets"),
        pytest.param("unix:/a", "unix:/a", True, id="one-socket"),
        pytest.param("unix:/a", "0.0.0.0:1", False, id="socket-and-port"),
    ],
)
def test_the_two_addresses_differ(bind: str, admin: str, clashes: bool) -> None:
    mapping: dict[str, object] = {**UPSTREAM, "RELAY_BIND": bind, "RELAY_ADMIN_BIND": admin}
    if clashes:
        assert "must differ from RELAY_BIND" in faults_of(mapping, service=True)[0]
    else:
        assert Settings.from_mapping(mapping, service=True).admin_bind == admin


@pytest.mark.parametrize(
    ("bind", "here"),
    [
        pytest.param("127.0.0.1:80", True, id="ipv4"),
        pytest.param("127.8.9.1:80", True, id="all-of-127"),
        pytest.param("[::1]:80", True, id="ipv6"),
        pytest.param("[::ffff:127.0.0.1]:80", True, id="mapped"),
        pytest.param("LocalHost:80", True, id="localhost"),
        pytest.param("unix:/run/x", True, id="unix"),
        pytest.param("0.0.0.0:80", False, id="everywhere"),
        pytest.param("[::]:80", False, id="everywhere-ipv6"),
        pytest.param("10.0.0.1:80", False, id="private"),
        pytest.param("localhost.example:80", False, id="a-name-like-it"),
        pytest.param("relay:80", False, id="any-name"),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(bind: str, here: bool) -> None:
    assert loopback(bind) is here


@pytest.mark.parametrize(
    ("url", "host"),
    [
        pytest.param("https://api.example/v1", "api.example", id="name"),
        pytest.param("http://[::1]:8080/v1", "[::1]:8080", id="ipv6-and-port"),
    ],
)
def test_the_upstream_s_host_is_there_for_the_log(url: str, host: str) -> None:
    assert Settings.from_mapping({"RELAY_UPSTREAM_URL": url}).upstream_host == host


def test_settings_do_not_change() -> None:
    found = Settings.from_mapping(UPSTREAM)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.heartbeat = 1  # type: ignore[misc]  # that is the point
    assert hash(found) == hash(Settings.from_mapping(UPSTREAM))


# --- .env.example -------------------------------------------------------------------------------------------------

LINE = re.compile(r"^#(?=RELAY_[A-Z_]+=)", re.MULTILINE)
BLOCKS = dict(
    re.findall(
        r"^# ---- ([\w. ]+).* ----\n((?:#RELAY_.*\n)+)", ENV_EXAMPLE.split("# ==== Every setting")[0], re.MULTILINE
    )
)
EVERY = ENV_EXAMPLE.split("# ==== Every setting")[1]


def loaded(text: str) -> dict[str, object]:
    """What python-dotenv makes of `text`; a line that it cannot read has no value."""
    values = dotenv_values(stream=io.StringIO(text))
    assert None not in values.values()
    return dict(values)


def test_the_example_sets_nothing_as_it_stands() -> None:
    assert loaded(ENV_EXAMPLE) == {}


def test_the_example_has_every_setting_once_in_order_with_its_meaning_and_default() -> None:
    listed = re.findall(r"^# (.+)\n#(RELAY_\w+)=(.*)$", EVERY, re.MULTILINE)
    assert listed == [(setting.meaning, setting.name, setting.default) for setting in SETTINGS]
    assert len(LINE.findall(EVERY)) == len(SETTINGS)


def test_the_example_with_every_line_taken_is_the_defaults() -> None:
    """The blocks come first, so the defaults that follow win over them, and `.env` may hold both."""
    mapping = loaded(LINE.sub("", ENV_EXAMPLE))
    assert set(mapping) == set(BY_NAME)
    found = Settings.from_mapping(mapping, service=True)
    assert found.max_streams == 900
    assert dataclasses.replace(found, max_streams=None) == Settings.from_mapping({}, service=True)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        pytest.param("HolySheep", {"upstream_url": "https://api.holysheep.ai/v1"}, id="holysheep"),
        pytest.param("OpenAI", {"upstream_url": "https://api.openai.com/v1"}, id="openai"),
        pytest.param(
            "Anthropic",
            {
                "upstream_url": "https://api.anthropic.com/v1",
                "upstream_key_header": "x-api-key",
                "upstream_headers": (("anthropic-version", "2023-06-01"),),
            },
            id="anthropic",
        ),
        pytest.param(
            "Azure OpenAI",
            {"upstream_key_header": "api-key", "upstream_query": "api-version=2024-10-21"},
            id="azure",
        ),
        pytest.param("vLLM on this machine", {"upstream_key": None, "allow": ALLOW_EVERYTHING}, id="vllm"),
        pytest.param("llama.cpp on this machine", {"upstream_key": None, "allow": ALLOW_EVERYTHING}, id="llama-cpp"),
    ],
)
def test_each_ready_block_gives_valid_settings(block: str, expected: dict[str, object]) -> None:
    found = Settings.from_mapping(loaded(LINE.sub("", BLOCKS[block])), service=True)
    assert {attribute: getattr(found, attribute) for attribute in expected} == expected
    assert found.upstream_url


def test_there_are_no_other_ready_blocks() -> None:
    assert len(BLOCKS) == 6


def test_every_line_means_the_same_to_a_shell() -> None:
    """systemd and people with `set -a; . ./.env` read the file too."""
    lines = LINE.sub("", ENV_EXAMPLE)
    script = f"set -a\n{lines}\nexec {sys.executable} -c 'import os; print(dict(os.environ))'"
    for text in (script, script.replace(EVERY, "")):
        subprocess.run(["/bin/sh", "-euc", text], check=True, capture_output=True, env={"PATH": "/usr/bin:/bin"})
