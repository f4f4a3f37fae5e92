"""What may be called, and how a target joins the upstream's base: text in, text out."""

from __future__ import annotations

import posixpath
import time
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.wire.target import (
    ALLOW_EVERYTHING,
    DEFAULT_ALLOW_WITH_KEY,
    METHODS,
    allows,
    bad_target,
    join,
    leaves_base,
    parse_allow,
    split_target,
)

# What a WSGI server may hand over in a target: visible ASCII and the bytes above it.
TARGET = st.text(st.sampled_from([chr(byte) for byte in (*range(0x21, 0x7F), *range(0x80, 0x100)) if byte != 0x23]))


#: What some server reads as more than one segment.
HIDDEN_SLASHES = (
    "a%2Fb", "a%2fb", "a%5Cb", "a\\b", "a%252Fb", "a%25252fb", "a%c0%afb", "a%e0%80%afb", "a%u002fb", "a%ef%bc%8fb",
    "a%EF%BC%BCb", "a%uff0fb", "a%u2215b", "a%25u2215b", "a%u2044b", "a%e2%88%95b", "a%e2%81%84b", "a%25e2%2588%2595b",
    "a\xe2\x88\x95b", "a%u2216b", "a%e2%88%96b",
)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        pytest.param("POST", "chat/completions", True, id="chat"),
        pytest.param("POST", "messages/count_tokens", True, id="count-tokens"),
        pytest.param("GET", "models", True, id="models"),
        pytest.param("HEAD", "models", True, id="head-where-get-is"),
        pytest.param("GET", "models/gpt-4.1", True, id="one-model"),
        pytest.param("HEAD", "models/gpt-4.1", True, id="head-of-one-model"),
        pytest.param("GET", "models/", False, id="star-is-not-empty"),
        pytest.param("GET", "models/a/b", False, id="star-stops-at-a-slash"),
        pytest.param("GET", "chat/completions", False, id="other-method"),
        pytest.param("post", "chat/completions", False, id="methods-have-a-case"),
        pytest.param("DELETE", "files/x", False, id="delete-a-file"),
        pytest.param("DELETE", "models/x", False, id="delete-a-model"),
        pytest.param("POST", "chat%2Fcompletions", False, id="encoded-slash"),
        pytest.param("POST", "chat/complet%69ons", False, id="encoded-letter"),
        pytest.param("POST", "/chat/completions", False, id="second-slash"),
        pytest.param("POST", "chat/completions/", False, id="trailing-slash"),
        pytest.param("POST", "chat/completions;x", False, id="parameters"),
        pytest.param("POST", "chat/completions\n", False, id="newline-at-the-end"),
        pytest.param("POST", "x/chat/completions", False, id="prefix"),
        pytest.param("POST", "", False, id="the-mount-itself"),
    ],
)
def test_with_a_key_only_inference_and_models_are_allowed(method: str, path: str, allowed: bool) -> None:
    assert allows(DEFAULT_ALLOW_WITH_KEY, method, path) is allowed


@pytest.mark.parametrize(
    ("text", "method", "path", "allowed"),
    [
        pytest.param("*", "DELETE", "any/thing", True, id="star-alone-is-everything"),
        pytest.param("*", "GET", "", True, id="star-alone-allows-the-mount-itself"),
        pytest.param("* models", "PATCH", "models", True, id="any-method"),
        pytest.param("* models", "PATCH", "files", False, id="any-method-one-path"),
        pytest.param("GET /models", "GET", "models", True, id="leading-slash"),
        pytest.param("get models", "GET", "models", True, id="method-in-lower-case"),
        pytest.param("GET /", "GET", "", True, id="the-mount-itself"),
        pytest.param("GET files/**", "GET", "files/a/b", True, id="two-stars-cross-slashes"),
        pytest.param("GET files/**", "GET", "files/", True, id="two-stars-may-be-empty"),
        pytest.param("GET files/**", "GET", "files", False, id="two-stars-keep-their-slash"),
        pytest.param("GET **.json", "GET", "a/b.json", True, id="two-stars-then-a-suffix"),
        pytest.param("GET a.c", "GET", "abc", False, id="a-dot-is-a-dot"),
        pytest.param("GET a|b", "GET", "a|b", True, id="a-bar-is-a-bar"),
        pytest.param("POST a, POST b , GET c", "POST", "b", True, id="several"),
        pytest.param("POST a, POST b , GET c", "GET", "b", False, id="several-by-method"),
        pytest.param("POST a, , GET c,", "GET", "c", True, id="empty-entries"),
        pytest.param("POST deployments/*/chat", "POST", "deployments/x%20y/chat", True, id="escape-within-star"),
        *(
            pytest.param("GET files/*", "GET", f"files/{hidden}", False, id=f"hidden-{hidden}")
            for hidden in HIDDEN_SLASHES
        ),
        *(
            pytest.param("GET files/**", "GET", f"files/{hidden}", True, id=f"any-{hidden}")
            for hidden in HIDDEN_SLASHES
        ),
        pytest.param("HEAD a, GET b", "HEAD", "a", True, id="head-keeps-its-own"),
        pytest.param("HEAD a, GET b", "HEAD", "b", True, id="head-adds-those-of-get"),
        pytest.param("HEAD a", "GET", "a", False, id="get-needs-its-own"),
    ],
)
def test_patterns_mean_what_the_table_says(text: str, method: str, path: str, allowed: bool) -> None:
    assert allows(parse_allow(text), method, path) is allowed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("", "names nothing", id="empty"),
        pytest.param(" , ", "names nothing", id="commas-only"),
        pytest.param("chat/completions", "not METHOD path", id="no-method"),
        pytest.param("GET", "not METHOD path", id="no-path"),
        pytest.param("GET a b", "not METHOD path", id="two-paths"),
        pytest.param("POST a, *", "not METHOD path", id="star-among-others"),
        pytest.param("PSOT a", "must begin with", id="unknown-method"),
        pytest.param("GET a?b=c", "without query", id="query"),
        pytest.param("GET a#b", "without query", id="fragment"),
        pytest.param("GET ü", "percent-encoded", id="not-ascii"),
        pytest.param("GET ../a", "never served", id="dots"),
        pytest.param("GET ***", "only once", id="three-stars"),
        pytest.param("GET **/a/**", "only once", id="two-stars-twice"),
        pytest.param("GET a*b*c", "one wildcard", id="two-wildcards-in-a-segment"),
        pytest.param("GET **a*", "one wildcard", id="both-wildcards-in-a-segment"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused_with_a_sentence(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_allow(text)


@given(st.sampled_from(sorted(METHODS)), TARGET)
def test_everything_is_everything(method: str, path: str) -> None:
    assert allows(ALLOW_EVERYTHING, method, path)


def test_no_path_makes_matching_slow() -> None:
    """The longest line that a server takes, against the worst that a pattern may be."""
    rules = parse_allow("GET **b/*b/*b/*c, GET *a/**/*a/*b, GET a*a/*a/**c")
    started = time.process_time()
    for path in ("b/" * 4096, "a" * 8192, "a/" * 4096, "ba/b" * 2048):
        allows(rules, "GET", path)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        pytest.param("/v1/models", "/v1/models", None, id="no-query"),
        pytest.param("/v1/models?", "/v1/models", "", id="empty-query"),
        pytest.param("/a?b=c&d=&=e;f", "/a", "b=c&d=&=e;f", id="query-as-it-came"),
        pytest.param("/a?b?c", "/a", "b?c", id="second-question-mark"),
        pytest.param("/a%2Fb%3Fc", "/a%2Fb%3Fc", None, id="escapes-kept"),
        pytest.param("//host/a", "//host/a", None, id="two-slashes-are-a-path"),
        pytest.param("/\xc3\xa4?\xff", "/\xc3\xa4", "\xff", id="raw-bytes"),
        pytest.param("http://h:80/a/b?c", "/a/b", "c", id="absolute-form"),
        pytest.param("HTTPS://u@h/a", "/a", None, id="absolute-form-with-user"),
        pytest.param("http://h", "/", None, id="absolute-form-without-path"),
        pytest.param("http://h?q", "/", "q", id="absolute-form-with-query-only"),
        pytest.param("/a?u=http://h/b", "/a", "u=http://h/b", id="url-in-the-query"),
        pytest.param("/http://h/b", "/http://h/b", None, id="url-in-the-path"),
        pytest.param("*", "*", None, id="asterisk-form"),
    ],
)
def test_a_target_is_split_at_its_first_question_mark(target: str, path: str, query: str | None) -> None:
    assert split_target(target) == (path, query)


@given(TARGET)
def test_splitting_and_joining_gives_the_same_bytes(text: str) -> None:
    path, query = split_target(f"/{text}")
    assert join("", path, query, "") == f"/{text}"
    assert split_target(f"http://host:1/{text}") == (path, query)


LEAVING = [
    *("..", ".", "../x", "x/..", "x/../y", "./x", "x/./y", "/..", "//../x", "..//x"),
    *("%2e%2e/x", "%2E%2e", ".%2e/x", "x/%2e/y", "%252e%252e/x", "%25252E.", "%%32%65."),
    *("x/..%2fy", "..%5cx", "x\\..\\y", "..\\x", "x%2f..%2fy", "x%252f%252e%252e"),
    *("..;/x", "..;a=b/x", "..%3b/x", ".;x", "..%3Fx", "..%23x", "..%253b/x"),
    *("..%20/x", "x/..%00", ".%09./x", "%0d../x", "..%0a", "x/.%20"),
    *("%c0%ae%c0%ae/x", "..%c0%afx", "..%c1%9cx", "%e0%80%ae./x", "%u002e%u002e/x", "..%u2215/../x"),
    *("\xc0\xae\xc0\xae/x", "%ef%bc%8e%ef%bc%8e/x", "..%ef%bc%8fx", "%e2%80%a5/x"),
    "%" + "25" * 9 + "2e.",
    "%" + "25" * 4000 + "2e.",
]
STAYING = [
    *("", "x", "/", "//", "x//y", "chat/completions", "models/gpt-4.1", "..foo", "a..b", "...", "foo..", "x/.../y"),
    *(".well-known/x", "..%2e", "a%2f..b", "%2e%2e%2e", "x;..", "x;a=../", "models/a%2fb", "%", "%zz", "100%", "%2"),
    *("\xc3\xa4/x", "%c3%a4.json", "%ff%fe.", "e%cc%81.x", "a%20b", "%25252525", "v1.0/..x/y"),
]


@pytest.mark.parametrize("path", LEAVING)
def test_dot_segments_are_found_in_every_disguise(path: str) -> None:
    assert leaves_base(path)
    assert bad_target(path, None)


@pytest.mark.parametrize("path", STAYING)
def test_plain_names_are_left_alone(path: str) -> None:
    assert not leaves_base(path)
    assert bad_target(path, "a=..&b=../x") is None


def encoded(text: str, times: int, choices: list[bool]) -> str:
    """Percent-encode some characters of `text`, the whole again and again."""
    once = "".join(
        f"%{ord(char):02x}" if chosen else char for char, chosen in zip(text, choices * len(text), strict=False)
    )
    for _ in range(times):
        once = quote(once, safe="/\\")
    return once


@given(
    before=st.sampled_from(["", "x/", "x\\", "/", "a/b//"]),
    dots=st.sampled_from([".", "..", "..;x", ".;"]),
    after=st.sampled_from(["", "/x", "\\x", "/"]),
    times=st.integers(0, 9),
    choices=st.lists(st.booleans(), min_size=1, max_size=8),
)
def test_no_way_of_encoding_hides_dots(before: str, dots: str, after: str, times: int, choices: list[bool]) -> None:
    assert leaves_base(encoded(before + dots + after, times, choices))


@given(st.text(st.sampled_from("./\\%25ef;x"), max_size=24))
def test_what_passes_stays_below_the_base_however_often_it_is_decoded(path: str) -> None:
    """An upstream that decodes, takes both slashes and resolves dots ends up at or below its base."""
    if leaves_base(path):
        return
    while True:
        resolved = posixpath.normpath("/base/" + path.replace("\\", "/"))
        assert resolved == "/base" or resolved.startswith("/base/")
        decoded = unquote(path, "latin-1")
        if decoded == path:
            return
        path = decoded


@given(TARGET)
def test_every_target_of_legal_bytes_is_judged(path: str) -> None:
    assert (bad_target(path, None) is not None) is leaves_base(path)


@pytest.mark.parametrize("char", [pytest.param(chr(code), id=f"0x{code:02x}") for code in (*range(0x21), 0x23, 0x7F)])
def test_controls_spaces_and_fragments_are_refused(char: str) -> None:
    assert "path" in (bad_target(f"a{char}b", None) or "")
    assert "query" in (bad_target("a", f"a{char}b") or "")


@pytest.mark.parametrize(
    ("base", "rest", "query", "extra", "target"),
    [
        pytest.param("/v1", "/chat", None, "", "/v1/chat", id="path"),
        pytest.param("/v1", "", None, "", "/v1", id="the-base-itself"),
        pytest.param("/v1", "/", None, "", "/v1/", id="trailing-slash-kept"),
        pytest.param("", "", None, "", "/", id="never-empty"),
        pytest.param("", "", "a", "", "/?a", id="never-empty-with-query"),
        pytest.param("", "//x", None, "", "//x", id="two-slashes-kept"),
        pytest.param("/v1", "/a%2Fb;c", "d=%20", "", "/v1/a%2Fb;c?d=%20", id="as-it-came"),
        pytest.param("/v1", "/a", "", "", "/v1/a?", id="empty-query-kept"),
        pytest.param("/v1", "/a", None, "k=v", "/v1/a?k=v", id="extra-alone"),
        pytest.param("/v1", "/a", "", "k=v", "/v1/a?k=v", id="extra-after-empty"),
        pytest.param("/v1", "/a", "b=c", "k=v", "/v1/a?b=c&k=v", id="extra-after-query"),
    ],
)
def test_what_follows_the_mount_is_appended_to_the_base(
    base: str, rest: str, query: str | None, extra: str, target: str
) -> None:
    assert join(base, rest, query, extra) == target


@pytest.mark.parametrize(
    ("query", "extra", "target"),
    [
        pytest.param("a=1&key=2&b=3", "key=v", "a=1&b=3&key=v", id="once"),
        pytest.param("a=1;key=2&b=3", "key=v", "a=1&b=3&key=v", id="after-a-semicolon"),
        pytest.param("key=2;a=1&b=3", "key=v", "a=1&b=3&key=v", id="before-a-semicolon"),
        pytest.param("a=1;b;;c&&%64=+%20", "key=v", "a=1;b;;c&&%64=+%20&key=v", id="the-rest-verbatim"),
        pytest.param("%6bey=2", "key=v", "key=v", id="encoded"),
        pytest.param("%256bey=2&KEY=3", "key=v", "key=v", id="encoded-twice"),
        pytest.param("%u006bey=2", "key=v", "key=v", id="iis-escape"),
        pytest.param("key[]=2&key%5B%5D=3&key[0]=4&[key]=5", "key=v", "key=v", id="brackets"),
        pytest.param("+key=2&%20key=3&%2Bkey=4&key+=5", "key=v", "key=v", id="spaces"),
        pytest.param("key%00=2&key%00x=3&key%2500=4", "key=v", "key=v", id="nul"),
        pytest.param("api.version=2", "api_version=v", "api_version=v", id="php-underscore"),
        pytest.param("a=1", "key=v;b=2", "a=1&key=v;b=2", id="the-operators-verbatim"),
        pytest.param(
            "keys=1&a=key&monkey=2&%2526=%26key", "key=v", "keys=1&a=key&monkey=2&%2526=%26key&key=v", id="other"
        ),
    ],
)
def test_an_operators_parameter_replaces_the_clients_however_it_is_written(query: str, extra: str, target: str) -> None:
    assert join("/v1", "/a", query, extra) == f"/v1/a?{target}"


def test_a_rest_without_its_slash_cannot_lengthen_the_base() -> None:
    with pytest.raises(ValueError, match="begin with a slash"):
        join("/v1", "beta/secrets", None, "")
