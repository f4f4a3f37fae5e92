"""Responses as bytes: what is a head, how its body is delimited, and that nothing is guessed at."""

from __future__ import annotations

import re
import tracemalloc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.wire import http1

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

OK = b"HTTP/1.1 200 OK\r\n"


def in_steps(data: bytes, step: int) -> list[bytes]:
    return [data[i : i + step] for i in range(0, len(data), step)]


STEPS = pytest.mark.parametrize(
    "step", [pytest.param(1, id="byte-by-byte"), pytest.param(3, id="by-three"), pytest.param(1 << 30, id="whole")]
)


def parsed(head: bytes, method: str = "GET") -> http1.Head:
    assert http1.head_length(head) == len(head)
    return http1.parse_head(head, method)


def head_of(*lines: bytes) -> bytes:
    return b"".join(line + b"\r\n" for line in (*lines, b""))


@dataclass
class Outcome:
    """What came of some bytes: the body, and `whole`, `cut` or `bad`."""

    body: bytes
    end: str
    excess: bool = False


def outcome(framing: http1.Framing, pieces: Iterable[bytes]) -> Outcome:
    """Feed until the body is done or broken, then end the connection."""
    body = b""
    try:
        for piece in pieces:
            body += framing.feed(piece)
        framing.end()
    except http1.BadResponse:
        assert not framing.done
        assert framing.fault is not None
        http1.Chunked().feed(b"1\r\nx\r\n")  # a known size
        for more in (b"1\r\nx\r\n", b"0\r\n\r\n"):
            with pytest.raises(http1.BadResponse):  # and it stays broken
                framing.feed(more)
        with pytest.raises(http1.BadResponse):
            framing.end()
        return Outcome(body, "bad", framing.excess)
    except http1.Truncated:
        assert not framing.done
        return Outcome(body, "cut", framing.excess)
    assert framing.done
    return Outcome(body, "whole", framing.excess)


# --- the end of the head ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(OK + b"\r\n", id="no-fields"),
        pytest.param(b"HTTP/1.1 200 OK\n\n", id="bare-lf"),
        pytest.param(b"HTTP/1.1 200 OK\nA: b\n\r\n", id="bare-lf-then-crlf"),
        pytest.param(b"HTTP/1.0 404 Not Found\r\nContent-Type: text/plain\r\n\n", id="crlf-then-bare-lf"),
        pytest.param(OK + b"A: " + b"x" * 8192 + b"\r\n\r\n", id="8-kib-field"),
    ],
)
@pytest.mark.parametrize("tail", [b"", b"body", b"\n", b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_head_ends_with_its_first_blank_line(head: bytes, tail: bytes) -> None:
    assert all(http1.head_length(head[:end]) == 0 for end in range(len(head)))
    assert http1.head_length(head + tail) == len(head)
    assert http1.parse_head(head, "GET").status in (200, 404)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"hello", id="http-0.9"),
        pytest.param(b"<html>", id="a-page"),
        pytest.param(b"H" * 7, id="begins-alike"),
        pytest.param(b"http/1.1 200 OK", id="lower-case"),
        pytest.param(b"HTTP/2 200", id="http-2"),
        pytest.param(b"HTTP/2.0 200", id="http-2.0"),
        pytest.param(b"HTTP/0.9 200", id="http-0.9-by-name"),
        pytest.param(b"HTTP/11", id="no-dot"),
        pytest.param(b"\r\nHTTP/1.1 200 OK", id="a-line-before"),
        pytest.param(b" HTTP/1.1 200 OK", id="a-space-before"),
        pytest.param(b"ICY 200 OK", id="shoutcast"),
        pytest.param(b"\x15\x03\x01\x00\x02", id="a-tls-alert"),
        pytest.param(b"PRI * HTTP/2.0", id="a-request"),
        pytest.param(b"\0", id="nul"),
    ],
)
def test_what_cannot_become_a_response_is_refused_at_its_first_wrong_byte(data: bytes) -> None:
    right = next(i for i in range(len(data) + 1) if data[: i + 1] != b"HTTP/1."[: i + 1])
    assert all(http1.head_length(data[:end]) == 0 for end in range(right + 1))
    for end in range(right + 1, len(data) + 1):
        with pytest.raises(http1.BadResponse):
            http1.head_length(data[:end])


def test_a_head_that_does_not_end_is_refused_at_the_limit_and_not_before() -> None:
    endless = OK + b"A: " + b"x" * http1.MAX_HEAD
    assert http1.head_length(endless[: http1.MAX_HEAD - 1]) == 0
    with pytest.raises(http1.BadResponse, match="256 KiB"):
        http1.head_length(endless[: http1.MAX_HEAD])
    longest = endless[: http1.MAX_HEAD - 4] + b"\r\n\r\n"
    assert http1.head_length(longest + b"body") == http1.MAX_HEAD
    with pytest.raises(http1.BadResponse, match="256 KiB"):
        http1.head_length(b"x".join([longest[:-4], longest[-4:]]))


def test_a_head_of_very_many_fields_is_refused_before_it_costs_anything() -> None:
    fields = b"a:\r\n" * http1.MAX_FIELDS
    head = parsed(OK + fields + b"\r\n")
    assert len(head.headers) == http1.MAX_FIELDS
    with pytest.raises(http1.BadResponse, match="1000 fields"):
        parsed(OK + fields + b"a:\r\n\r\n")
    with pytest.raises(http1.BadResponse, match="1000 fields"):
        parsed(OK + b"a:\n" * 80_000 + b"\n")


# --- the status line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        pytest.param(b"HTTP/1.1 200 OK", 200, "OK", id="plain"),
        pytest.param(b"HTTP/1.0 200 OK", 200, "OK", id="http-1.0"),
        pytest.param(b"HTTP/1.1 200 ", 200, "", id="empty-reason"),
        pytest.param(b"HTTP/1.1 200", 200, "", id="no-reason-and-no-space"),
        pytest.param(b"HTTP/1.1 429 Too Many Requests", 429, "Too Many Requests", id="spaces"),
        pytest.param(b"HTTP/1.1 200  OK ", 200, "OK", id="spaces-around"),
        pytest.param("HTTP/1.1 404 Niçht gefünden".encode(), 404, "NiÃ§ht gefÃ¼nden", id="utf-8"),
        pytest.param("HTTP/1.1 404 Voilà".encode(), 404, "VoilÃ\xa0", id="utf-8-that-ends-like-a-space"),
        pytest.param(b"HTTP/1.1 500 \xe9\xff", 500, "éÿ", id="latin-1"),
        pytest.param(b"HTTP/1.1 200 a\x01\x1b[31m\tb\x7f", 200, "a[31m\tb", id="controls-are-left-out"),
        pytest.param(b"HTTP/1.1 299 Made Up", 299, "Made Up", id="unknown-status"),
        pytest.param(b"HTTP/1.1 529 ", 529, "", id="anthropics-own"),
        pytest.param(b"HTTP/1.1 999 No", 999, "No", id="999"),
        pytest.param(b"HTTP/1.1 103 Early Hints", 103, "Early Hints", id="interim"),
    ],
)
def test_a_status_line(line: bytes, status: int, reason: str) -> None:
    for end in (b"\r\n", b"\n"):
        head = parsed(line + end + b"A: b" + end + end)
        assert (head.status, head.reason) == (status, reason)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"HTTP/1.1", id="nothing-else"),
        pytest.param(b"HTTP/1.1 ", id="no-status"),
        pytest.param(b"HTTP/1.1 20 OK", id="two-digits"),
        pytest.param(b"HTTP/1.1 2000 OK", id="four-digits"),
        pytest.param(b"HTTP/1.1 000 ", id="zero"),
        pytest.param(b"HTTP/1.1 099 ", id="below-100"),
        pytest.param(b"HTTP/1.1 -20 ", id="negative"),
        pytest.param(b"HTTP/1.1 +20 ", id="plus"),
        pytest.param(b"HTTP/1.1 2x0 OK", id="letters"),
        pytest.param("HTTP/1.1 ٢٠٠ OK".encode(), id="other-digits"),
        pytest.param(b"HTTP/1.1  200 OK", id="two-spaces"),
        pytest.param(b"HTTP/1.1\t200 OK", id="tab"),
        pytest.param(b"HTTP/1.1 200\tOK", id="tab-after"),
        pytest.param(b"HTTP/1.1 200OK", id="no-space-after"),
        pytest.param(b"HTTP/1.2 200 OK", id="http-1.2"),
        pytest.param(b"HTTP/1.10 200 OK", id="http-1.10"),
        pytest.param(b"HTTP/1.1x200 OK", id="no-space"),
        pytest.param(b"HTTP/1.1 200 a\rb", id="cr-in-the-reason"),
        pytest.param(b"HTTP/1.1 200 a\0b", id="nul-in-the-reason"),
        pytest.param(b"HTTP/1.1 200 OK\r", id="two-crs"),
    ],
)
def test_a_malformed_status_line_is_refused(line: bytes) -> None:
    with pytest.raises(http1.BadResponse, match="status line"):
        parsed(line + b"\r\n\r\n")


# --- the fields ---------------------------------------------------------------------------------------------------


def test_fields_keep_their_names_bytes_order_and_repetitions() -> None:
    every_byte = bytes({*range(0x21, 0x7F), *range(0x80, 0x100), 0x20, 0x09})
    long = every_byte * 38 + b"x" * 26
    assert len(long) > 8000
    head = parsed(
        head_of(
            b"HTTP/1.1 200 OK",
            b"X-Long: !" + long + b"!",
            b"x-odd_~Name|:\t a b \t",
            b"Empty:",
            b"Set-Cookie: a=1",
            b"Other: 1",
            b"set-cookie: b=2, c",
            b"Colon: a:b: c",
        )
    )
    assert head.headers == [
        ("X-Long", f"!{long.decode('latin-1')}!"),
        ("x-odd_~Name|", "a b"),
        ("Empty", ""),
        ("Set-Cookie", "a=1"),
        ("Other", "1"),
        ("set-cookie", "b=2, c"),
        ("Colon", "a:b: c"),
    ]
    assert head.fields["set-cookie"] == "a=1, b=2, c"
    assert head.fields["x-odd_~name|"] == "a b"


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"no colon", id="no-colon"),
        pytest.param(b"NoColon", id="a-bare-name"),
        pytest.param(b": value", id="no-name"),
        pytest.param(b"A : b", id="space-before-the-colon"),
        pytest.param(b"A\t: b", id="tab-before-the-colon"),
        pytest.param(b" folded: value", id="obs-fold"),
        pytest.param(b"\tfolded", id="obs-fold-tab"),
        pytest.param(b"A b: c", id="space-in-the-name"),
        pytest.param(b"A(b): c", id="delimiter-in-the-name"),
        pytest.param(b'"A": c', id="quoted-name"),
        pytest.param("Ä: c".encode(), id="utf-8-name"),
        pytest.param(b"A\0: c", id="nul-in-the-name"),
        pytest.param(b"A: b\0c", id="nul-in-the-value"),
        pytest.param(b"A: b\rc", id="cr-in-the-value"),
        pytest.param(b"A: b\rEvil: c", id="cr-as-a-line-end"),
        pytest.param(b"A: b\r", id="two-crs"),
        pytest.param(b"A: \r\r", id="three-crs"),
        pytest.param(b"A: b\x0bc", id="vertical-tab"),
        pytest.param(b"A: b\x1bc", id="escape"),
        pytest.param(b"A: b\x7fc", id="delete"),
        pytest.param(b"\r", id="a-line-of-cr"),
    ],
)
def test_a_malformed_field_is_refused(line: bytes) -> None:
    for position in range(3):
        lines = [b"First: 1", b"Second: 2"]
        lines.insert(position, line)
        head = head_of(b"HTTP/1.1 200 OK", *lines)
        with pytest.raises(http1.BadResponse, match="header line"):
            http1.parse_head(head[: http1.head_length(head)], "GET")


@given(st.binary(max_size=200))
@example(b" 200 OK\r\nA: b\r\n\r\n")
@example(b" 200 OK\r\nTransfer-Encoding: chunked\n\n")
def test_whatever_follows_http_1_is_a_head_or_refused(rest: bytes) -> None:
    data = b"HTTP/1.1" + rest
    length = http1.head_length(data)
    if not length:
        return
    try:
        head = http1.parse_head(data[:length], "GET")
    except http1.BadResponse:
        return
    assert 100 <= head.status <= 999
    for name, value in head.headers:
        assert re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name)
        assert not re.search(r"[\0\r\n]", value)
        assert f"{name}:".encode() in data
        assert value.encode("latin-1") in data


TOKEN = st.text(st.sampled_from("!#$%&'*+-.^_`|~019azAZ"), min_size=1, max_size=12)
VALUE = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=40).map(lambda s: s.strip(" \t"))


@given(
    st.lists(st.tuples(TOKEN, VALUE), max_size=12), st.sampled_from([b"\r\n", b"\n"]), st.sampled_from(["", " ", "\t "])
)
def test_any_sound_fields_come_out_as_they_went_in(fields: list[tuple[str, str]], end: bytes, space: str) -> None:
    lines = [f"{name}:{space}{value}{space}".encode("latin-1") for name, value in fields]
    head = parsed(end.join([b"HTTP/1.1 200 OK", *lines, b"", b""]), "HEAD")
    assert head.headers == fields
    for name, _ in fields:
        same = [value for other, value in fields if other.lower() == name.lower()]
        assert head.fields[name.lower()] == ", ".join(same)


# --- which framing ------------------------------------------------------------------------------------------------

CHUNKED, LENGTH, CLOSE, NONE = http1.Chunked, http1.Length, http1.UntilClose, http1.NoBody


@pytest.mark.parametrize(
    ("method", "status", "fields", "framing"),
    [
        pytest.param("GET", b"200", [b"Content-Length: 5"], LENGTH, id="length"),
        pytest.param("GET", b"200", [b"Content-Length: 0"], LENGTH, id="length-0"),
        pytest.param("GET", b"200", [b"Content-Length: 5, 5"], LENGTH, id="length-twice-in-a-list"),
        pytest.param("GET", b"200", [b"Content-Length: 5", b"Content-Length: 5"], LENGTH, id="length-twice"),
        pytest.param("GET", b"200", [b"content-LENGTH:5\t"], LENGTH, id="length-case-and-space"),
        pytest.param("GET", b"200", [b"Content-Length: 007"], LENGTH, id="length-leading-zeros"),
        pytest.param("GET", b"200", [b"Content-Length: 999999999999999999"], LENGTH, id="length-18-digits"),
        pytest.param("GET", b"200", [b"Transfer-Encoding: chunked"], CHUNKED, id="chunked"),
        pytest.param("GET", b"200", [b"transfer-encoding:  CHUNKED "], CHUNKED, id="chunked-case-and-space"),
        pytest.param("POST", b"500", [b"Transfer-Encoding: chunked"], CHUNKED, id="chunked-error"),
        pytest.param("GET", b"200", [], CLOSE, id="until-close"),
        pytest.param("GET", b"200", [b"Connection: keep-alive"], CLOSE, id="until-close-whatever-it-says"),
        pytest.param("GET", b"301", [], CLOSE, id="redirect-until-close"),
        pytest.param("HEAD", b"200", [b"Content-Length: 5"], NONE, id="head-length"),
        pytest.param("HEAD", b"200", [b"Transfer-Encoding: chunked"], NONE, id="head-chunked"),
        pytest.param("HEAD", b"200", [], NONE, id="head-nothing"),
        pytest.param("GET", b"204", [], NONE, id="204"),
        pytest.param("GET", b"204", [b"Content-Length: 5"], NONE, id="204-length"),
        pytest.param("GET", b"204", [b"Transfer-Encoding: chunked"], NONE, id="204-chunked"),
        pytest.param("GET", b"304", [b"Content-Length: 5"], NONE, id="304-length"),
        pytest.param("GET", b"304", [b"Transfer-Encoding: chunked"], NONE, id="304-chunked"),
        pytest.param("GET", b"205", [b"Content-Length: 0"], LENGTH, id="205"),
        pytest.param("GET", b"100", [], NONE, id="100"),
        pytest.param("GET", b"103", [b"Link: </a>"], NONE, id="103"),
        pytest.param("POST", b"102", [b"Content-Length: 5"], NONE, id="102-length"),
    ],
)
def test_how_a_body_is_delimited(method: str, status: bytes, fields: list[bytes], framing: type[http1.Framing]) -> None:
    head = parsed(head_of(b"HTTP/1.1 " + status + b" X", *fields), method)
    assert type(head.framing) is framing
    assert head.framing.done is (framing is NONE or b"Content-Length: 0" in fields)


@pytest.mark.parametrize(
    ("version", "fields"),
    [
        pytest.param(b"1.1", [b"Transfer-Encoding: chunked", b"Content-Length: 5"], id="te-and-cl"),
        pytest.param(b"1.1", [b"Content-Length: 5", b"Transfer-Encoding: chunked"], id="cl-and-te"),
        pytest.param(b"1.1", [b"Content-Length: 0", b"transfer-encoding: chunked"], id="cl-0-and-te"),
        pytest.param(b"1.1", [b"Content-Length: 5", b"Content-Length: 6"], id="two-lengths"),
        pytest.param(b"1.1", [b"Content-Length: 5, 6"], id="two-lengths-in-a-list"),
        pytest.param(b"1.1", [b"Content-Length: 5, 05"], id="two-spellings-of-a-length"),
        pytest.param(b"1.1", [b"Content-Length: 5,"], id="length-and-nothing"),
        pytest.param(b"1.1", [b"Content-Length:"], id="empty-length"),
        pytest.param(b"1.1", [b"Content-Length: +5"], id="plus"),
        pytest.param(b"1.1", [b"Content-Length: -5"], id="negative"),
        pytest.param(b"1.1", [b"Content-Length: 5.0"], id="decimal"),
        pytest.param(b"1.1", [b"Content-Length: 0x5"], id="hex"),
        pytest.param(b"1.1", [b"Content-Length: 1_000"], id="underscore"),
        pytest.param(b"1.1", [b"Content-Length: 5 5"], id="space"),
        pytest.param(b"1.1", [b"Content-Length: 5;a"], id="parameter"),
        pytest.param(b"1.1", [b"Content-Length: five"], id="word"),
        pytest.param(b"1.1", [b"Content-Length: 5\xa0"], id="latin-1-space"),
        pytest.param(b"1.1", [b"Content-Length: 5\x85"], id="latin-1-next-line"),
        pytest.param(b"1.1", [b"Content-Length: \xb2"], id="superscript-two"),
        pytest.param(b"1.1", ["Content-Length: \u0665".encode()], id="other-digits"),
        pytest.param(b"1.1", [b"Content-Length: 1000000000000000000"], id="19-digits"),
        pytest.param(b"1.1", [b"Content-Length: " + b"9" * 5000], id="5000-digits"),
        pytest.param(b"1.1", [b"Transfer-Encoding: gzip"], id="te-gzip"),
        pytest.param(b"1.1", [b"Transfer-Encoding: gzip, chunked"], id="te-gzip-chunked"),
        pytest.param(b"1.1", [b"Transfer-Encoding: chunked, gzip"], id="te-chunked-gzip"),
        pytest.param(b"1.1", [b"Transfer-Encoding: chunked, chunked"], id="te-chunked-twice"),
        pytest.param(b"1.1", [b"Transfer-Encoding: chunked"] * 2, id="te-repeated"),
        pytest.param(b"1.1", [b"Transfer-Encoding: identity"], id="te-identity"),
        pytest.param(b"1.1", [b"Transfer-Encoding:"], id="te-empty"),
        pytest.param(b"1.1", [b"Transfer-Encoding: xchunked"], id="te-xchunked"),
        pytest.param(b"1.1", [b"Transfer-Encoding: chunked;a=b"], id="te-parameter"),
        pytest.param(b"1.1", [b"Transfer-Encoding: chunked\xa0"], id="te-latin-1-space"),
        pytest.param(b"1.1", [b"Transfer-Encoding: \x85chunked"], id="te-latin-1-next-line"),
        pytest.param(b"1.0", [b"Transfer-Encoding: chunked"], id="te-in-http-1.0"),
    ],
)
@pytest.mark.parametrize(("method", "status"), [("GET", b"200"), ("HEAD", b"200"), ("GET", b"204"), ("GET", b"304")])
def test_contradictory_framing_is_refused(version: bytes, fields: list[bytes], method: str, status: bytes) -> None:
    head = head_of(b"HTTP/" + version + b" " + status + b" OK", b"A: b", *fields, b"C: d")
    with pytest.raises(http1.BadResponse, match=r"Content-Length|Transfer-Encoding"):
        parsed(head, method)


def test_a_204_never_shows_a_length() -> None:
    assert "content-length" not in parsed(head_of(b"HTTP/1.1 204 No Content", b"Content-Length: 5")).fields
    assert parsed(head_of(b"HTTP/1.1 304 Not Modified", b"Content-Length: 5")).fields["content-length"] == "5"


@pytest.mark.parametrize(
    ("version", "fields", "keeps_open"),
    [
        pytest.param(b"1.1", [b"Content-Length: 1"], True, id="1.1"),
        pytest.param(b"1.1", [b"Content-Length: 1", b"Connection: close"], False, id="1.1-close"),
        pytest.param(b"1.1", [b"Content-Length: 1", b"Connection: x, CLOSE"], False, id="1.1-close-in-a-list"),
        pytest.param(b"1.1", [b"Content-Length: 1", b"Connection: x", b"connection: Close"], False, id="1.1-repeated"),
        pytest.param(b"1.1", [b"Content-Length: 1", b"Connection: closed"], True, id="1.1-another-word"),
        pytest.param(b"1.1", [], False, id="1.1-until-close"),
        pytest.param(b"1.0", [b"Content-Length: 1"], False, id="1.0"),
        pytest.param(b"1.0", [b"Content-Length: 1", b"Connection: Keep-Alive"], True, id="1.0-keep-alive"),
        pytest.param(b"1.0", [b"Connection: keep-alive"], False, id="1.0-keep-alive-until-close"),
        pytest.param(b"1.0", [b"Content-Length: 1", b"Connection: keep-alive, close"], False, id="1.0-both"),
    ],
)
def test_whether_the_connection_stays_open(version: bytes, fields: list[bytes], keeps_open: bool) -> None:
    assert parsed(head_of(b"HTTP/" + version + b" 200 OK", *fields)).keeps_open is keeps_open


# --- bodies that are not chunked ----------------------------------------------------------------------------------


@STEPS
def test_a_body_of_so_many_bytes(step: int) -> None:
    assert outcome(http1.Length(5), in_steps(b"hello", step)) == Outcome(b"hello", "whole")
    assert outcome(http1.Length(5), in_steps(b"hello\n", step)) == Outcome(b"hello", "whole", excess=True)
    assert outcome(http1.Length(5), in_steps(b"hell", step)) == Outcome(b"hell", "cut")
    assert outcome(http1.Length(5), []) == Outcome(b"", "cut")
    assert outcome(http1.Length(0), []) == Outcome(b"", "whole")
    assert outcome(http1.Length(0), in_steps(b"HTTP/1.1 200", step)) == Outcome(b"", "whole", excess=True)


@STEPS
def test_a_body_that_the_end_of_the_connection_ends(step: int) -> None:
    assert outcome(http1.UntilClose(), in_steps(b"0\r\n\r\n", step)) == Outcome(b"0\r\n\r\n", "whole")
    assert outcome(http1.UntilClose(), []) == Outcome(b"", "whole")


@STEPS
def test_no_body(step: int) -> None:
    assert outcome(http1.NoBody(), []) == Outcome(b"", "whole")
    assert outcome(http1.NoBody(), in_steps(b"hello", step)) == Outcome(b"", "whole", excess=True)


@given(st.binary(max_size=50), st.integers(0, 60), st.integers(1, 60))
def test_a_length_gives_what_came_up_to_it(data: bytes, length: int, step: int) -> None:
    got = outcome(http1.Length(length), in_steps(data, step))
    assert got == Outcome(data[:length], "whole" if len(data) >= length else "cut", excess=len(data) > length)


# --- chunked bodies -----------------------------------------------------------------------------------------------


def dechunk(wire: bytes) -> Outcome:
    """The reference: all of the wire at once, one rule of RFC 9112 section 7.1 after the other."""
    body = b""
    while True:
        line, newline, wire = wire.partition(b"\n")
        if len(line) > http1.MAX_CHUNK_LINE:
            return Outcome(body, "bad")
        if not newline:
            return Outcome(body, "cut")
        size = re.fullmatch(rb"([0-9A-Fa-f]+)[ \t]*(\r|;[^\r]*\r)?", line)
        if not size or len(size[1]) > 15:
            return Outcome(body, "bad")
        length = int(size[1], 16)
        if not length:
            break
        body += wire[:length]
        if len(wire) < length:
            return Outcome(body, "cut")
        wire = wire[length:]
        if wire.startswith((b"\n", b"\r\n")):
            wire = wire.partition(b"\n")[2]
        elif wire in (b"", b"\r"):
            return Outcome(body, "cut")
        else:
            # One byte alone is not judged yet, since the line may still end.
            return Outcome(body, "cut" if len(wire) == 1 else "bad")
    trailer = 0
    while True:
        line, newline, wire = wire.partition(b"\n")
        if newline and line in (b"", b"\r"):
            return Outcome(body, "whole", excess=bool(wire))
        trailer += len(line)
        if trailer > http1.MAX_TRAILER:
            return Outcome(body, "bad")
        if not newline:
            return Outcome(body, "cut")


def agrees(wire: bytes, pieces: list[bytes]) -> Outcome:
    got, reference = outcome(http1.Chunked(), pieces), dechunk(wire)
    assert got == reference
    return got


@STEPS
@pytest.mark.parametrize(
    ("wire", "body"),
    [
        pytest.param(b"5\r\nhello\r\n0\r\n\r\n", b"hello", id="one"),
        pytest.param(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", b"hello world", id="two"),
        pytest.param(b"5\r\nhello\r\n" * 50 + b"0\r\n\r\n", b"hello" * 50, id="fifty"),
        pytest.param(b"0\r\n\r\n", b"", id="empty"),
        pytest.param(b"a\r\n0123456789\r\n0\r\n\r\n", b"0123456789", id="lower-case-size"),
        pytest.param(b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789", id="upper-case-size"),
        pytest.param(b"000000000000005\r\nhello\r\n000\r\n\r\n", b"hello", id="leading-zeros"),
        pytest.param(b"5 \t\r\nhello\r\n0 \r\n\r\n", b"hello", id="space-after-the-size"),
        pytest.param(b"5;a=b;c\r\nhello\r\n0;last\r\n\r\n", b"hello", id="extensions"),
        pytest.param(b'5 ; a="\0\xff;5"\r\nhello\r\n0\r\n\r\n', b"hello", id="extension-of-anything"),
        pytest.param(b"5;" + b"x" * 4000 + b"\r\nhello\r\n0\r\n\r\n", b"hello", id="long-extension"),
        pytest.param(b"5\nhello\n0\n\n", b"hello", id="bare-lf"),
        pytest.param(b"5\r\nhello\n0\r\n\n", b"hello", id="bare-lf-here-and-there"),
        pytest.param(b"5\r\nhello\r\n0\r\nA: b\r\nC: d\r\n\r\n", b"hello", id="trailers"),
        pytest.param(b"5\r\nhello\r\n0\r\nA: " + b"x" * 9000 + b"\r\n\r\n", b"hello", id="long-trailer"),
        pytest.param(b"5\r\n\r\n0\r\n\r\n0\r\n\r\n", b"\r\n0\r\n", id="data-that-looks-like-framing"),
        pytest.param(b"2\r\n\r\n\r\n1\r\n\n\r\n0\r\n\r\n", b"\r\n\n", id="data-of-line-ends"),
    ],
)
def test_a_chunked_body(wire: bytes, body: bytes, step: int) -> None:
    for _ in range(2):  # the second time its sizes are known
        assert agrees(wire, in_steps(wire, step)) == Outcome(body, "whole")
        tail = wire + b"HTTP/1.1 200 OK\r\n"
        assert agrees(tail, in_steps(tail, step)) == Outcome(body, "whole", excess=True)
    for end in range(0, len(wire), max(1, len(wire) // 100)):
        got = agrees(wire[:end], in_steps(wire[:end], step))
        assert got.end == "cut"
        assert body.startswith(got.body)


@STEPS
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b" 5", id="space-before"),
        pytest.param(b"+5", id="plus"),
        pytest.param(b"-5", id="minus"),
        pytest.param(b"0x5", id="0x"),
        pytest.param(b"0X5", id="0X"),
        pytest.param(b"x5", id="x"),
        pytest.param(b"5h", id="5h"),
        pytest.param(b"1_0", id="underscore"),
        pytest.param(b"_5", id="underscore-before"),
        pytest.param(b"5.0", id="point"),
        pytest.param(b"5 5", id="two-sizes"),
        pytest.param(b"5,5", id="comma"),
        pytest.param(b"g", id="not-hex"),
        pytest.param(b"five", id="a-word"),
        pytest.param("\u0665".encode(), id="other-digits"),
        pytest.param(b"\xb2", id="superscript"),
        pytest.param(b"5\0", id="nul"),
        pytest.param(b"5\x0b", id="vertical-tab"),
        pytest.param(b"5\xa0", id="latin-1-space"),
        pytest.param(b"5\r", id="two-crs"),
        pytest.param(b"5\rX", id="cr-within"),
        pytest.param(b"5;a\rb", id="cr-within-an-extension"),
        pytest.param(b"5;a\r", id="two-crs-after-an-extension"),
        pytest.param(b";a=b", id="only-an-extension"),
        pytest.param(b"0" * 16, id="16-zeros"),
        pytest.param(b"f" * 16, id="16-digits"),
        pytest.param(b"0000000000000005", id="16-digits-for-5"),
        pytest.param(b"1" + b"0" * 40, id="41-digits"),
        pytest.param(b"5;" + b"x" * http1.MAX_CHUNK_LINE, id="too-long"),
        pytest.param(b"data: x", id="no-framing-at-all"),
    ],
)
@pytest.mark.parametrize("before", [pytest.param(b"", id="first"), pytest.param(b"5\r\nhello\r\n", id="later")])
def test_an_unsound_size_is_refused(line: bytes, before: bytes, step: int) -> None:
    wire = before + line + b"\r\nhello\r\n0\r\n\r\n"
    got = agrees(wire, in_steps(wire, step))
    assert got.end == "bad"
    assert got.body == before[3:8], "nothing but what came in sound chunks"


@STEPS
@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"5\r\nhelloX\r\n0\r\n\r\n", id="longer-than-it-says"),
        pytest.param(b"5\r\nhello0\r\n\r\n", id="no-line-end"),
        pytest.param(b"5\r\nhello\rX\n0\r\n\r\n", id="cr-and-no-lf"),
        pytest.param(b"5\r\nhello \r\n0\r\n\r\n", id="a-space-before-the-line-end"),
        pytest.param(b"5\r\nhello\r\r\n0\r\n\r\n", id="two-crs"),
        pytest.param(b"5\r\nhello\r\n\r\n0\r\n\r\n", id="a-blank-line-between"),
        pytest.param(b"5;a\nhello\r\n0\r\n\r\n", id="extension-ended-by-a-bare-lf"),
    ],
)
def test_broken_framing_is_refused_but_the_bytes_before_it_are_not_lost(wire: bytes, step: int) -> None:
    got = agrees(wire, in_steps(wire, step))
    assert got.end == "bad"
    assert got.body == (b"" if b";" in wire else b"hello")


def test_sound_bytes_come_before_the_fault_that_is_known_by_then() -> None:
    framing = http1.Chunked()
    assert framing.feed(b"5\r\nhello\r\n5\r\nworld\r\nWRONG\r\n") == b"helloworld"
    assert framing.fault is not None
    for _ in range(2):
        with pytest.raises(http1.BadResponse, match="no sound size"):
            framing.feed(b"5\r\nagain\r\n")
        with pytest.raises(http1.BadResponse, match="no sound size"):
            framing.end()


def test_the_trailer_has_a_limit_however_it_comes() -> None:
    line = b"A: " + b"x" * 1021 + b"\r\n"
    fits = b"0\r\n" + line * 63 + b"\r\n"
    too_long = b"0\r\n" + line * 65 + b"\r\n"
    endless = b"0\r\nA: " + b"x" * (http1.MAX_TRAILER + 10)
    for step in (1, 1000, 1 << 30):
        assert agrees(fits, in_steps(fits, step)).end == "whole"
        assert agrees(too_long, in_steps(too_long, step)).end == "bad"
        assert agrees(endless, in_steps(endless, step)).end == "bad"


@dataclass(frozen=True)
class Wire:
    """A chunked body on the wire, in the pieces that it comes in."""

    body: bytes
    wire: bytes
    pieces: list[bytes]


@st.composite
def wires(draw: st.DrawFn) -> Wire:
    """Any way to write a chunked body that the relay takes, split anywhere."""
    chunks = draw(
        st.lists(st.binary(min_size=1, max_size=40) | st.sampled_from([b"\r\n", b"\n", b"0\r\n\r\n"]), max_size=8)
    )
    wire = b""
    size_format = draw(st.sampled_from(["%x", "%X", "%04x", "%015X"]))
    plain = draw(st.booleans())
    for chunk in [*chunks, b""]:
        size = (size_format % len(chunk)).encode()
        space = b"" if plain else draw(st.sampled_from([b"", b" ", b"\t "]))
        extension = b"" if plain else draw(st.sampled_from([b"", b"", b";a", b' ;a="b\tc\0"', b";5;\xff"]))
        end = b"\r\n" if plain or extension else draw(st.sampled_from([b"\r\n", b"\n"]))
        wire += size + space + extension + end + chunk
        if chunk:
            wire += b"\r\n" if plain else draw(st.sampled_from([b"\r\n", b"\n"]))
    for line in draw(st.lists(st.sampled_from([b"A: b\r\n", b"c:\n", b"garbage\r\n"]), max_size=3)):
        wire += line
    wire += draw(st.sampled_from([b"\r\n", b"\n"]))
    return Wire(b"".join(chunks), wire, draw(split(wire)))


@st.composite
def split(draw: st.DrawFn, data: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=10)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@given(wires())
def test_any_chunked_body_in_any_pieces_gives_its_bytes(sent: Wire) -> None:
    assert agrees(sent.wire, sent.pieces) == Outcome(sent.body, "whole")


@given(wires(), st.data())
def test_one_changed_byte_never_gives_bytes_that_a_reader_of_the_whole_would_not(
    sent: Wire, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, len(sent.wire) - 1))
    changed = sent.wire[:position] + data.draw(st.binary(max_size=2)) + sent.wire[position + 1 :]
    agrees(changed, data.draw(split(changed)))


FRAGMENTS = st.sampled_from(
    [b"5\r\nhello\r\n", b"0\r\n", b"\r\n", b"\n", b"\r", b"3", b";a", b"1\r\nx", b"abc", b"-", b" "]
)


@given(st.one_of(st.binary(max_size=80), st.lists(FRAGMENTS, max_size=15).map(b"".join)), st.data())
def test_garbage_is_cut_or_bad_and_never_anything_else(garbage: bytes, data: st.DataObject) -> None:
    agrees(garbage, data.draw(split(garbage)))


# --- memory -------------------------------------------------------------------------------------------------------

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("make", "first", "piece"),
    [
        pytest.param(http1.Chunked, b"fffffffffffffff\r\n", b"x" * 65_536, id="a-chunk-of-an-exbibyte"),
        pytest.param(http1.Chunked, b"", b"1000\r\n" + b"x" * 4096 + b"\r\n", id="chunks-for-ever"),
        pytest.param(lambda: http1.Length(10**18 - 1), b"", b"x" * 65_536, id="an-exabyte"),
        pytest.param(http1.UntilClose, b"", b"x" * 65_536, id="until-close"),
    ],
)
def test_what_is_declared_is_not_allocated(make: Callable[[], http1.Framing], first: bytes, piece: bytes) -> None:
    framing = make()
    tracemalloc.start()
    try:
        passed = len(framing.feed(first)) if first else 0
        for _ in range(200):
            passed += len(framing.feed(piece))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert passed >= 200 * 4096
    assert peak < MIB / 2


def test_the_sizes_that_are_remembered_are_bounded() -> None:
    framing = http1.Chunked()
    for size in range(1, 20_000):
        framing.feed(b"%X\r\n%s\r\n" % (size, b"x" * size))
        for digits in (7, 11):
            framing.feed(b"%0*x\r\n" % (digits, size) + b"x" * size + b"\n")
    assert len(http1._KNOWN_SIZES) <= http1._MOST_KNOWN_SIZES
    assert max(len(line) for line in http1._KNOWN_SIZES) <= http1._LONGEST_KNOWN_LINE + 1
    assert all(int(line, 16) == size for line, size in http1._KNOWN_SIZES.items())
