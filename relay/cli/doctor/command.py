"""The command `relay doctor`: what it takes, what it prints, and how it ends.

Findings go to standard output, progress to standard error. No key and no header that it was given is printed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from relay.cli.doctor.examine import Examination
    from relay.cli.doctor.findings import Finding
    from relay.settings import Settings

_NOTHING_FOUND, _FOUND, _NOT_REACHED = range(3)
_INTERRUPTED = 130  # as shells have it for a program that SIGINT has ended
#: Time-outs that proxies are shipped with.
_USUAL_SILENCES = (30, 60, 100)
_KEY = "RELAY_CLIENT_KEY"


#: Of each command that looks at the service's settings.
env_file = click.option(
    "--env-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Read this file's settings beneath the environment, as the service reads its .env.",
)


@click.command("doctor", short_help="Look at a chain of proxies from the client's end.")
@click.argument("url")
@click.option("--key", metavar="KEY", help=f"A client key, if the relay wants one. Better in {_KEY}: ps shows this.")
@click.option("-H", "--header", "headers", multiple=True, metavar="NAME:VALUE", help="Sent along, such as a login's.")
@click.option("--silence", is_flag=True, help="Also try 30, 60 and 100 s of silence: it takes as long.")
@click.option("--quick", is_flag=True, help="Try no silence at all: it takes seconds.")
@click.option("--insecure", is_flag=True, help="Go on if the certificate is not trusted. Sends the key, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@env_file
def doctor(
    *,
    url: str,
    key: str | None,
    headers: tuple[str, ...],
    silence: bool,
    quick: bool,
    insecure: bool,
    as_json: bool,
    env_file: Path | None,
) -> None:
    """Look at the chain that leads to the relay at URL (with its mount: https://relay.example.com/v1), and say what
    is wrong with it, and what to do.

    It asks the relay for streams whose times are known, and sees what becomes of them on the way: held back,
    compressed, cached, cut. Takes about as long as the relay may be silent (RELAY_HOLD, RELAY_HEARTBEAT). In the
    environment of the service, and with its --env-file, it checks the settings, too.

    Exit status 0: nothing was found. 1: there are findings. 2: no relay was reached, or the command is wrong.
    130: Ctrl-C.
    """
    from relay.cli.doctor.examine import Wishes, examine
    from relay.cli.doctor.findings import findings
    from relay.cli.doctor.probe import Target, Unreachable

    if quick and silence:
        raise click.UsageError("--quick and --silence contradict each other")
    try:
        target = Target.parse(url, verify=not insecure)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="URL") from None
    key = key or os.environ.get(_KEY) or None
    wishes = Wishes(
        headers=_headers(key, headers), with_key=bool(key), silences=_USUAL_SILENCES if silence else (), quick=quick
    )
    faults, settings = _beside_the_service(env_file)
    if settings is not None:
        wishes.mount = settings.mount
    try:
        found = examine(target, wishes, _progress())
    except Unreachable as error:
        _not_reached(target.url, str(error), faults, as_json=as_json)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    found.seen.settings_faults = faults
    every = findings(found.seen)
    if as_json:
        click.echo(json.dumps(_report(found, every), indent=2))
    else:
        _tell(found, every)
    sys.exit(_FOUND if every else _NOTHING_FOUND)


def _headers(key: str | None, given: tuple[str, ...]) -> list[tuple[str, str]]:
    """The request headers. Raises UsageError for one that cannot be sent; its value is not shown."""
    headers = [("Authorization", f"Bearer {key}")] if key else []
    for one in given:
        name, colon, value = one.partition(":")
        if not colon or not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name):
            raise click.UsageError("a --header must be NAME:VALUE")
        headers.append((name, value.strip()))
    if not all(re.fullmatch(r"[\t\x20-\x7e\x80-\xff]*", value) for _, value in headers):
        raise click.UsageError("the key or a header has a character that cannot be sent")
    return headers


def _beside_the_service(file: Path | None) -> tuple[tuple[str, ...], Settings | None]:
    """The faults of the settings in this environment and file, and the settings; nothing where there are none."""
    from relay.settings import Settings, SettingsError
    from relay.settings.environment import read

    try:
        given: dict[str, object] = dict(read(file))
        given.pop(_KEY, None)  # the doctor's own
        if not any(name.startswith("RELAY_") for name in given):
            return _dotenv_unread(), None
        return _dotenv_unread(), Settings.from_mapping(given, service=True)
    except SettingsError as fault:
        return fault.faults, None
    except OSError as error:
        return (f".env cannot be read: {error}",), None


def _dotenv_unread() -> tuple[str, ...]:
    """A `.env` that has settings of the relay's, and that a service here would not read. A shop's own is its own."""
    file = Path(".env")
    if file.is_file() and b"RELAY_" in file.read_bytes():
        try:
            import dotenv  # noqa: F401
        except ModuleNotFoundError:
            return ("nothing reads .env without the package python-dotenv; pip install python-dotenv",)
    return ()


def _progress() -> Callable[[str], None]:
    lock = threading.Lock()

    def say(sentence: str) -> None:
        with lock:
            click.echo(f"… {sentence}", err=True)

    return say


def _not_reached(url: str, sentence: str, faults: tuple[str, ...], *, as_json: bool) -> NoReturn:
    if as_json:
        click.echo(json.dumps({"url": url, "error": sentence, "settings_faults": faults}, indent=2))
    click.echo(f"No relay was reached: {sentence.rstrip('.')}{'' if sentence.endswith('?') else '.'}", err=True)
    for fault in faults:
        click.echo(f"A setting in this folder is wrong: {fault}", err=True)
    sys.exit(_NOT_REACHED)


def _report(found: Examination, every: list[Finding]) -> dict[str, Any]:
    """What --json prints. Times are seconds."""
    seen = found.seen
    pace = seen.pace
    measured: dict[str, Any] = {}
    if pace is not None:
        measured = {
            "arrival": pace.arrival,
            "events": len(pace.ticks),
            "events_sent": pace.of,
            "held_back": round(pace.held_back, 3),
            "first_byte": round(pace.answer.head_at, 3),
            "content_encoding": pace.encoding or None,
            "ended": pace.ended,
            "heartbeat": seen.heartbeat,
            "keep_alive": None if seen.kept is None else round(seen.kept, 1),
            "relay_saw": pace.told.get("seen"),
            "relay_version": pace.told.get("version"),
            "headers": pace.answer.headers,
        }
    return {
        "url": found.target.url,
        "findings": [{"name": one.name, "explanation": one.explanation, "cure": one.cure} for one in every],
        "notes": found.notes,
        "measured": measured,
        "silences": [
            {"seconds": seconds, "stands": timeline.complete, "cut_after": _cut_after(timeline)}
            for seconds, timeline in seen.silences
        ],
        "http2": seen.http2,
        "health": seen.health,
    }


def _cut_after(timeline: Any) -> float | None:
    return None if timeline.complete else round(timeline.silent, 1)


def _tell(found: Examination, every: list[Finding]) -> None:
    """What was seen, a line each; then each finding."""
    for name, said in _lines(found):
        click.echo(f"  {name:<9} {said}")
    for note in found.notes:
        click.echo(f"  {'note':<9} {note}")
    if not every:
        click.secho("\nNothing is wrong with this chain.", fg="green")
        return
    click.echo(f"\n{len(every)} finding{'s' if len(every) > 1 else ''}:")
    for one in every:
        click.secho(f"\n{one.name}", bold=True)
        click.echo(f"  {one.explanation}\n  What to do: {one.cure}")


def _lines(found: Examination) -> list[tuple[str, str]]:
    from relay.cli.doctor import hops

    seen, pace = found.seen, found.seen.pace
    lines = [("relay", found.target.url)]
    if pace is not None:
        told = pace.told.get("seen", {})
        signs = hops.signs(pace.answer.headers)
        hop = f"{told.get('protocol')}, {told.get('forwarded') or 'no'}"
        lines += [
            ("edge", pace.answer.version + {True: ", HTTP/2 offered", False: ", no HTTP/2", None: ""}[seen.http2]),
            ("headers", ", ".join(signs) or "none that tells of a proxy"),
            ("last hop", f"{hop} address{'' if told.get('forwarded') == 1 else 'es'} in X-Forwarded-For"),
            ("events", f"{len(pace.ticks)} of {pace.of}, {pace.arrival}, up to {pace.held_back * 1000:.0f} ms late"),
            ("answer", f"after {pace.answer.head_at * 1000:.0f} ms"),
        ]
    for seconds, timeline in seen.silences:
        lines.append(
            ("silence", f"{seconds:g} s: " + ("stands" if timeline.complete else f"cut after {timeline.silent:.1f} s"))
        )
    if pace is not None:
        lines.append(("beats", f"every {seen.heartbeat:g} s" if seen.heartbeat else "off"))
    if seen.health is not None:
        upstream = seen.health.get("upstream")
        key = upstream.get("key") if isinstance(upstream, dict) else None
        lines.append(("health", f"{seen.health.get('status')}, upstream key {key}"))
    return lines
