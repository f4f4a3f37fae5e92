"""The command `relay chat`: what it takes, what it prints, and how it ends.

The answer goes to standard output as it comes, everything else to standard error. No key and no header that it was
given is printed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from relay.client import Stream, StreamError

_NOT_WHOLE, _NOT_BEGUN = 1, 2
_INTERRUPTED = 128 + 2  # what a shell says of SIGINT
_KEY = "RELAY_CLIENT_KEY"
#: Whatever would move a terminal's cursor, or do worse to it: the C0 and C1 controls but tab and line feed.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@click.command("chat", short_help="Ask for an answer and print it as it comes.")
@click.argument("prompt", required=False)
@click.option(
    "--base-url", default="http://127.0.0.1:8000/v1", show_default=True, metavar="URL", help="As other clients have it."
)
@click.option("-m", "--model", metavar="NAME", help="The model to ask; without it the other side decides, or refuses.")
@click.option("--key", metavar="KEY", help=f"A client key, if one is wanted. Better in {_KEY}: ps shows this.")
@click.option("-H", "--header", "headers", multiple=True, metavar="NAME:VALUE", help="Sent along, such as a login's.")
@click.option("--path", metavar="PATH", help="What to POST to below the base URL, if not chat/completions.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up after so much silence.",
)
@click.option(
    "--ca", type=click.Path(exists=True), metavar="FILE", help="Certificates to trust, in place of the usual ones."
)
@click.option("--events", is_flag=True, help="Print each event as a line of JSON, not the text.")
@click.option("-q", "--quiet", "--no-stats", "quiet", is_flag=True, help="Say nothing of times and speed.")
def chat(
    *,
    prompt: str | None,
    base_url: str,
    model: str | None,
    key: str | None,
    headers: tuple[str, ...],
    path: str | None,
    timeout: float,
    ca: str | None,
    events: bool,
    quiet: bool,
) -> None:
    """Ask for an answer to PROMPT and print it as it comes; then, on standard error, how fast it was. With - in place
    of PROMPT, or without one in a pipe, the prompt is read from standard input.

    A base URL without a path is a relay's own address: its /api/stream-chat knows a model when none is named.
    Ctrl-C ends the answer at its source, too.

    Exit status 0: the whole answer came. 1: it did not: an error in the stream, a cut, a silence, or standard output
    was closed. 2: no answer began: not reachable, refused, no event stream, or the command is wrong. 130: Ctrl-C.
    """
    out = _Output()
    try:
        try:
            options: dict[str, Any] = {"model": model, "path": path, "timeout": timeout, "ca": ca, "events": events}
            options |= {"key": key or os.environ.get(_KEY) or None, "headers": _headers(headers)}
            status, said = _converse(out, base_url, _prompt(prompt), options)
        except KeyboardInterrupt:
            status, said = _INTERRUPTED, ""
        out.end_line()
    except BrokenPipeError:
        status, said = _NOT_WHOLE, ""
        # Nobody reads on. Python would try once more at its own end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if said and (status or not quiet):
        click.echo(said, err=True)
    sys.exit(status)


def _converse(out: _Output, base_url: str, prompt: str, options: dict[str, Any]) -> tuple[int, str]:
    """Ask, and print what comes; gives the exit status and what to say on standard error."""
    from relay.client import NotAnEventStream, Refused, StreamError, Unreachable, stream_chat

    started = time.monotonic()
    try:
        try:
            stream = stream_chat(base_url, prompt, **options)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        with stream:
            for piece in stream:
                out.write(piece if isinstance(piece, str) else f"{json.dumps(asdict(piece))}\n")
    except (NotAnEventStream, Refused, Unreachable) as error:
        return _NOT_BEGUN, _sentence(error)
    except StreamError as error:
        return _NOT_WHOLE, _sentence(error)
    return 0, _stats(stream, time.monotonic() - started)


def _prompt(given: str | None) -> str:
    """The prompt, from the command line or standard input."""
    if given is None and sys.stdin.isatty():
        raise click.UsageError('there is no prompt: relay chat "…", or - to read it from standard input')
    if given is not None and given != "-":
        text = given
    else:
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError:
            raise click.UsageError("standard input is not UTF-8") from None
    if not text.strip():
        raise click.UsageError("the prompt is empty")
    return text


def _headers(given: tuple[str, ...]) -> dict[str, str]:
    headers = {}
    for one in given:
        name, colon, value = one.partition(":")
        if not colon:
            raise click.UsageError("a --header must be NAME:VALUE")
        headers[name] = value.strip()
    return headers


class _Output:
    """Standard output: each piece is out when `write` comes back."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._last = "\n"

    def write(self, text: str) -> None:
        self._last = text[-1:] or self._last
        if self._terminal:
            text = _CONTROLS.sub("", text)
        sys.stdout.buffer.write(text.encode(_encoding(), "replace"))
        sys.stdout.buffer.flush()

    def end_line(self) -> None:
        """So that what follows, a shell's prompt as well, begins a line."""
        if self._last != "\n":
            self.write("\n")


def _encoding() -> str:
    return sys.stdout.encoding if sys.stdout.isatty() else "utf-8"


def _stats(stream: Stream[Any], seconds: float) -> str:
    """One line: the first byte, how many events and characters, and how fast they came."""
    flowing = max(seconds - stream.first_byte, 0.001) if stream.first_byte is not None else seconds

    def of(count: int, what: str) -> str:
        return f"{count} {what} ({count / flowing:.0f}/s)"

    first = "-" if stream.first_byte is None else f"{stream.first_byte * 1000:.0f} ms"
    return (
        f"first byte after {first} · {of(stream.events, 'events')} · {of(stream.characters, 'characters')}"
        f" · {seconds:.2f} s in all"
    )


def _sentence(error: StreamError) -> str:
    """Its message as one line, and what to look for in the relay's log."""
    said = " ".join(error.message.split()).rstrip(".")
    return _CONTROLS.sub("", said + (f" (request id {error.request_id})." if error.request_id else "."))
