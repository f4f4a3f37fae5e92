"""Plain kinds of value: words, switches, durations, sizes, counts, lists.

Each kind takes a string (the environment) or a value that is already typed (an app's
config) and gives the checked value or raises `FaultError`. Nothing here knows a setting's
name, another setting, or the network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# RFC 9110 §5.6.2: a header's name.
TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")

_ON = frozenset({"on", "true", "yes", "1"})
_OFF = frozenset({"off", "false", "no", "0", ""})

_NUMBER = re.compile(r"(?P<amount>[0-9]{1,15}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})\s*(?P<unit>[a-z]*)")
# What a unit is in seconds or bytes, by its name.
Units: TypeAlias = "Mapping[str, float]"

_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9,
    "k": 2**10, "m": 2**20, "g": 2**30,
    "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip

# As the library `limits` reads it; it parses the text again when counting starts.
_RATE = re.compile(
    r"[1-9][0-9]*\s*(?:/|per)\s*(?:[1-9][0-9]*\s*)?"
    r"(?:second|minute|hour|day|month|year)s?",
    re.IGNORECASE,
)


class FaultError(ValueError):
    """One value that a setting does not take.

    `sentence` says what is wrong and what to do; empty, the kind's own description
    serves. `show=False` keeps the value out of the message, for a value that is no
    secret by its setting but may hold one by mistake, such as a URL with a password.
    """

    def __init__(self, sentence: str = "", *, show: bool = True) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.show = show


@dataclass(frozen=True, slots=True)
class Kind:
    """What a setting takes: `allowed` says it in words, `parse` checks it.

    `parse` never sees None, which is "not set". It gives the value for `Settings` or
    raises FaultError.
    """

    allowed: str
    parse: Callable[[object], object]


def as_text(value: object) -> str:
    """Return a text without the white space around it; any other type is a FaultError."""
    if not isinstance(value, str):
        raise FaultError(f"must be a text, not {type(value).__name__}")
    return value.strip()


def as_items(value: object) -> tuple[str, ...]:
    """Return the entries of a comma-separated text, list, tuple or set, each once.

    A text of nothing but commas is a fault: to many settings, no entry means that everybody may.
    """
    entries = value.split(",") if isinstance(value, str) else value
    if isinstance(entries, (set, frozenset)):
        entries = sorted(entries, key=str)
    if not isinstance(entries, (list, tuple)):
        raise FaultError(f"must be a text or a list, not {type(value).__name__}")
    items = tuple(dict.fromkeys(item for entry in entries if (item := as_text(entry))))
    if not items and isinstance(value, str) and value.strip():
        raise FaultError("has nothing between its commas")
    return items


def printable(value: object) -> str | None:
    """Return a text of printable characters; None where it is empty."""
    text = as_text(value)
    if not text.isprintable():
        raise FaultError
    return text or None


def required(value: object) -> str:
    """Return a text of printable characters; an empty one is a FaultError."""
    text = printable(value)
    if text is None:
        raise FaultError("may not be empty; leave the setting out for its default")
    return text


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower() if isinstance(value, (str, int)) else None
    if word in _ON:
        return True
    if word in _OFF:
        return False
    raise FaultError


def _quantity(value: object, units: Units) -> float:
    """Return a number of seconds or bytes, whatever its size; NaN and infinity pass, and fail every bound."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    found = _NUMBER.fullmatch(as_text(value).lower())
    if found is None or found["unit"] not in units:
        raise FaultError
    amount = found["amount"]
    return (float(amount) if "." in amount else int(amount)) * units[found["unit"]]


def _within(low: float, high: float, units: Units, *, zero: bool = False) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if zero and isinstance(value, str) and not value.strip():
            return 0
        quantity = _quantity(value, units)
        if not (low <= quantity <= high or (zero and quantity == 0)):
            raise FaultError
        return quantity

    return parse


def duration(low: float, high: float, *, zero: str = "") -> Kind:
    """A time from `low` to `high` seconds, kept as float seconds.

    `zero` says what 0 (or an empty value) means where it is allowed.
    """
    check = _within(low, high, _SECONDS, zero=bool(zero))
    allowed = f"a time from {in_seconds(low)} to {in_seconds(high)}, such as 15, 500ms, 15s, 2m or 1h{_or_zero(zero)}"
    return Kind(allowed, lambda value: float(check(value)))


def size(low: int, high: int) -> Kind:
    """A number of bytes from `low` to `high`."""
    check = _within(low, high, _BYTES)
    allowed = f"a size from {in_bytes(low)} to {in_bytes(high)}, such as 65536, 64KiB, 32MiB or 1GB"

    def parse(value: object) -> int:
        quantity = check(value)
        if quantity != int(quantity):
            raise FaultError("must come to whole bytes")
        return int(quantity)

    return Kind(allowed, parse)


def count(low: int, high: int, *, zero: str = "", unset: bool = False) -> Kind:
    """A whole number from `low` to `high`; `unset` lets an empty value be None."""
    check = _within(low, high, {"": 1}, zero=bool(zero))

    def parse(value: object) -> int | None:
        if unset and isinstance(value, str) and not value.strip():
            return None
        quantity = check(value)
        if quantity != int(quantity):
            raise FaultError
        return int(quantity)

    return Kind(f"a whole number from {low} to {high}{_or_zero(zero)}", parse)


def _rate(value: object) -> str | None:
    text = as_text(value)
    if not text:
        return None
    if not all(_RATE.fullmatch(part.strip()) for part in re.split("[,;|]", text)):
        raise FaultError
    return text


def in_seconds(seconds: float) -> str:
    """Write a time as the settings take it: `10ms`, `15s`, `24h`."""
    for unit in ("h", "m", "s"):
        amount = seconds / _SECONDS[unit]
        if amount >= 1 and amount == int(amount):
            return f"{int(amount)}{unit}"
    return f"{seconds * 1000:g}ms"


def in_bytes(size_in_bytes: int) -> str:
    """Write a size as the settings take it: `1KiB`, `16GiB`."""
    for unit in ("GiB", "MiB", "KiB"):
        factor = _BYTES[unit.lower()]
        if size_in_bytes >= factor and size_in_bytes % factor == 0:
            return f"{size_in_bytes // factor}{unit}"
    return f"{size_in_bytes}B"


def _or_zero(meaning: str) -> str:
    return f"; 0 {meaning}" if meaning else ""


SWITCH = Kind("on or off", _switch)
RATE = Kind("a number of requests per time, such as 60/minute or 10/second", _rate)
NAME = Kind("a name", required)
NAMES = Kind("names separated by commas", lambda value: frozenset(as_items(value)) or None)
