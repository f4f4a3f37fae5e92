"""What may be called, and how a request's target joins the upstream's base URL.

Pure text: nothing here opens a connection, knows Flask or reads a setting. Targets
are `str` in WSGI's manner, bytes decoded as latin-1, and are never re-encoded: what
goes upstream is cut out of what came, byte for byte. Decoding happens only to look.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_plus

if TYPE_CHECKING:
    from collections.abc import Iterable

# What the relay routes (README.md, "What it answers").
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# RFC 9112 §3.2.2: a proxy's request names the whole URL. `//host` is a path.
_ABSOLUTE_FORM = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")

# RFC 3986 §2: neither controls nor spaces; `#` begins what a client keeps to itself,
# and servers disagree on whether the path ends there. Bytes above 0x7f are let
# through: some clients send raw UTF-8.
_NOT_IN_TARGET = re.compile(r"[^\x21\x22\x24-\x7e\x80-\xff]")

# Servers that strip these from a segment's ends see `..` in `..%20` and `.%09.`.
_STRIPPED_BY_SOME = re.compile(r"[\x00-\x20\x7f]")

# `;` begins parameters that Java servers cut off; `?` and `#`, once decoded, end the
# path for those that decode before they split.
_DOT_SEGMENT = re.compile(r"(?:\A|[/\\])\.{1,2}(?:[;?#][^/\\]*)?(?=[/\\]|\Z)")

# UTF-8 forbids these longer spellings of ASCII (RFC 3629 §3), some decoders take
# them: of `.` `/` `\`. `%u002e` is IIS's own escape, of any character.
_ILL_SPELT = re.compile(
    r"(?:\xc0|\xe0\x80|\xf0\x80\x80)(?P<low>[\xae\xaf])"
    r"|(?:\xc1|\xe0\x81|\xf0\x80\x81)\x9c"
    r"|%u(?P<hex>[0-9a-f]{4})",
    re.IGNORECASE,
)

# Windows' "best fit" to an 8-bit code page makes slashes of these: division and fraction slash, set minus.
_BEST_FIT = str.maketrans("\u2215\u2044\u2216", "//\\")

# What frameworks make of a parameter's name: `name[]` and `[name]` (PHP, Rails, qs), ` name` (PHP), `name\0` (C).
_BARE_NAME = re.compile(r"[\x00-\x20\[]*([^\x00\[\]=]*)")
_U_ESCAPE = re.compile(r"%u([0-9a-f]{4})", re.IGNORECASE)
_UNDERSCORES = str.maketrans(". ", "__")

# An honest path is encoded once, through a careless gateway twice. The bound keeps
# `%252525…2e` from costing a round for each of its thousands of layers.
_MOST_ENCODINGS = 8


@dataclass(frozen=True, slots=True)
class AllowRule:
    """The paths that one method may call.

    `method` is a method's name or `*` for any; `paths` are the patterns as written,
    without a leading slash; `pattern` matches all of them at once, and `strict` those
    whose wildcards for one segment stand for no encoded character.
    """

    method: str
    paths: tuple[str, ...]
    pattern: re.Pattern[str] = field(repr=False)
    strict: re.Pattern[str] = field(repr=False)


def parse_allow(text: str) -> tuple[AllowRule, ...]:
    """Compile `METHOD path` patterns separated by commas, one rule for each method.

    `*` alone allows everything. As a method, `*` is any method. In a path, `*` is a
    non-empty run of characters without a slash and `**` any run, slashes included. A
    leading slash is optional, and `HEAD` is allowed where `GET` is. So that matching
    takes linear time whatever a client sends, a path holds `**` at most once and each
    of its segments at most one wildcard.

    Raises ValueError with a sentence that names the pattern at fault.
    """
    patterns = [pattern for part in text.split(",") if (pattern := part.strip())]
    if not patterns:
        raise ValueError("names nothing to allow; write * for everything")
    if patterns == ["*"]:
        return ALLOW_EVERYTHING
    paths: dict[str, list[str]] = {}
    for pattern in patterns:
        method, path = _parse_pattern(pattern)
        paths.setdefault(method, []).append(path)
    if "GET" in paths:
        paths["HEAD"] = paths["GET"] + paths.get("HEAD", [])
    return tuple(_rule(method, of_method) for method, of_method in paths.items())


def allows(rules: Iterable[AllowRule], method: str, raw_path: str) -> bool:
    """Whether `rules` let `method` call `raw_path`.

    `raw_path` is what follows the mount and its slash, as it came: percent signs are
    not decoded, so `chat%2Fcompletions` is not `chat/completions`.
    """
    hidden = _hides_slash(raw_path)
    return any(
        rule.method in (method, "*") and (rule.strict if hidden else rule.pattern).fullmatch(raw_path) is not None
        for rule in rules
    )


def _hides_slash(raw_path: str) -> bool:
    """Whether a server behind might read a slash or backslash in `raw_path` beyond the slashes that stand in it.

    To such a server one segment is several: `files/*` would open `files/abc/content`.
    """
    if "%" not in raw_path and "\\" not in raw_path and raw_path.isascii():
        return False
    seen, slashes = raw_path, raw_path.count("/")
    for _ in range(_MOST_ENCODINGS + 1):
        if "\\" in seen or seen.count("/") != slashes:
            return True
        decoded = _decode_once(seen)
        if decoded == seen:
            return False
        seen = decoded
    return True


def split_target(raw_target: str) -> tuple[str, str | None]:
    """Split a request target into its raw path and raw query.

    The absolute form (`http://host/path?query`) is cut down to the origin form. The
    query is None where there is no `?` and empty where nothing follows it.
    """
    absolute = _ABSOLUTE_FORM.match(raw_target)
    if absolute is not None:
        raw_target = raw_target[absolute.end() :]
    path, mark, query = raw_target.partition("?")
    if absolute is not None and not path:
        path = "/"
    return path, query if mark else None


def bad_target(raw_path: str, query: str | None) -> str | None:
    """Return the sentence for a 400 if this target must not go upstream, else None."""
    if _NOT_IN_TARGET.search(raw_path) is not None:
        return "the path must not contain spaces, control characters or '#'"
    if query and _NOT_IN_TARGET.search(query) is not None:
        return "the query must not contain spaces, control characters or '#'"
    if leaves_base(raw_path):
        return "the path must not contain '.' or '..' segments, however encoded"
    return None


def leaves_base(raw_path: str) -> bool:
    """Whether any upstream might read a `.` or `..` segment in `raw_path`.

    Looks through percent-encoding, single or repeated, both slashes, parameters after
    the dots, bytes that some servers strip, and spellings of `.`, `/` and `\\` outside
    ASCII. A path that is encoded more than eight times over counts as hiding one.
    Names such as `..foo`, `a..b` and `...` are plain names.
    """
    if "." not in raw_path and "%" not in raw_path and raw_path.isascii():
        return False
    seen = raw_path
    for _ in range(_MOST_ENCODINGS + 1):
        if _DOT_SEGMENT.search(_STRIPPED_BY_SOME.sub("", seen)) is not None:
            return True
        decoded = _decode_once(seen)
        if decoded == seen:
            return False
        seen = decoded
    return True


def query_names(query: str) -> frozenset[str]:
    """Return the names of a raw query's parameters as any server may compare them: decoded, bare, in lower case."""
    return frozenset(_parameter_name(part) for part in re.split("[&;]", query) if part)


def _parameter_name(part: str) -> str:
    name = part.partition("=")[0]
    for _ in range(_MOST_ENCODINGS):
        decoded = unquote_plus(_U_ESCAPE.sub(lambda found: chr(int(found[1], 16)), name), "latin-1")
        if decoded == name:
            break
        name = decoded
    bare = _BARE_NAME.match(name)
    # PHP has underscores for dots and spaces.
    return (bare[1] if bare else name).rstrip().translate(_UNDERSCORES).lower()


def _without(query: str, names: frozenset[str]) -> str:
    """A raw query without the parameters of these names; some servers separate with `;` too (HTML 4.01, B.2.2)."""
    groups = ([part for part in group.split(";") if _parameter_name(part) not in names] for group in query.split("&"))
    return "&".join(";".join(kept) for kept in groups if kept)


def join(base_path: str, rest: str, query: str | None, extra_query: str) -> str:
    """Return the request target to send upstream, never empty.

    `base_path` is the upstream URL's path without a trailing slash, `rest` what
    follows the mount: empty, or beginning with a slash. An empty `query` keeps its
    `?`; `extra_query` is added to whatever is there, in place of parameters of its
    names (`query_names`).

    Raises ValueError for a `rest` without its slash: `/v1` must not become `/v1x`.
    """
    if rest and rest[0] != "/":
        raise ValueError("what follows the mount must begin with a slash")
    target = base_path + rest or "/"
    if extra_query:
        if query:
            query = _without(query, query_names(extra_query))
        query = f"{query}&{extra_query}" if query else extra_query
    return target if query is None else f"{target}?{query}"


def _decode_once(text: str) -> str:
    """One round of what an upstream might do to a path before it looks for dots."""
    text = _ILL_SPELT.sub(_spell_well, unquote(text, "latin-1"))
    if text.isascii():
        return text
    # Servers that normalise Unicode make `/`, `.` and `%` of their full-width kin.
    wide = text.encode("latin-1").decode("utf-8", "surrogateescape")
    folded = unicodedata.normalize("NFKC", wide.translate(_BEST_FIT))
    return folded.encode("utf-8", "surrogateescape").decode("latin-1")


def _spell_well(found: re.Match[str]) -> str:
    if found["hex"]:
        return chr(int(found["hex"], 16)).encode("utf-8", "surrogatepass").decode("latin-1")
    return chr(ord(found["low"]) & 0x7F) if found["low"] else "\\"


def _parse_pattern(pattern: str) -> tuple[str, str]:
    """Split one `METHOD path` into a method in upper case and a path without slash."""
    method, *rest = pattern.split()
    method = method.upper()
    if len(rest) != 1:
        raise ValueError(f"{pattern!r} is not METHOD path, such as POST chat/completions")
    if method != "*" and method not in METHODS:
        raise ValueError(f"{pattern!r} must begin with * or {', '.join(sorted(METHODS))}")
    path = rest[0].removeprefix("/")
    if not path.isascii() or "?" in path or _NOT_IN_TARGET.search(path) is not None:
        raise ValueError(
            f"{pattern!r} must be a path without query, its characters beyond ASCII"
            " percent-encoded as clients send them"
        )
    if leaves_base(path):
        raise ValueError(f"{pattern!r} has a . or .. segment, which is never served")
    segments = re.findall(r"\*+", path)
    if "***" in path or segments.count("**") > 1:
        raise ValueError(f"{pattern!r} may contain ** only once")
    if any(len(re.findall(r"\*+", part)) > 1 for part in path.split("/")):
        raise ValueError(f"{pattern!r} may have one wildcard between two slashes")
    return method, path


def _rule(method: str, paths: list[str]) -> AllowRule:
    return AllowRule(method, tuple(paths), _compiled(paths, "[^/]+"), _compiled(paths, r"[^/%\\\x80-\xff]+"))


def _compiled(paths: list[str], segment: str) -> re.Pattern[str]:
    in_regex = {"*": segment, "**": ".*"}
    alternatives = (
        "".join(in_regex.get(part) or re.escape(part) for part in re.split(r"(\*+)", path)) for path in paths
    )
    return re.compile("|".join(alternatives), re.DOTALL)


ALLOW_EVERYTHING: tuple[AllowRule, ...] = (_rule("*", ["**"]),)

# Inference and what costs nothing; not files, fine-tuning jobs or an account's keys,
# which the same upstream key would open.
DEFAULT_ALLOW_WITH_KEY: tuple[AllowRule, ...] = parse_allow(
    "POST chat/completions, POST completions, POST responses, POST messages,"
    " POST messages/count_tokens, POST embeddings, GET models, GET models/*"
)
# A model's name may be `org/model`, encoded as one segment: to read of it opens nothing, even if it is taken for two.
_MODEL_OF_AN_ORG = re.compile(r"models/[^/%\\\x80-\xff]+%2[Ff][^/%\\\x80-\xff]+")
DEFAULT_ALLOW_WITH_KEY += tuple(
    AllowRule(method, ("models/*%2F*",), _MODEL_OF_AN_ORG, _MODEL_OF_AN_ORG) for method in ("GET", "HEAD")
)
