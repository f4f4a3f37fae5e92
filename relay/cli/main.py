"""The command `relay`: what an operator asks on the machine that the service runs on, and what anybody asks a relay.

It reads the environment and, if told with `--env-file`, a file such as the service's `.env`. It
starts nothing, and no line that it prints holds a key. Every failure is a sentence and an exit status.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from relay.cli.chat import chat
from relay.cli.doctor.command import doctor, env_file
from relay.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from relay.settings import Setting, Settings

# Exit statuses of `relay check-key`. A faulty setting is EX_CONFIG (78), as it is for the service.
_ACCEPTED, _REJECTED, _UNREACHABLE, _UNDECIDED = range(4)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="relay %(version)s")
def commands() -> None:
    """Carries an upstream's Server-Sent Events to a client byte for byte, the moment they arrive.

    `settings` and `check-key` look at the settings of the service: the environment and, with --env-file .env, that
    file. The service itself is started with gunicorn: gunicorn -c python:relay.gunicorn_conf
    """


commands.add_command(chat)
commands.add_command(doctor)


@commands.command("settings", short_help="Check the settings of the service and print them.")
@click.option("-v", "--verbose", is_flag=True, help="Say what each setting means and takes, too.")
@env_file
def show_settings(*, verbose: bool, env_file: Path | None) -> None:
    """Check the settings that the service would start with, and print them.

    A value that may be secret is not shown. Exit status 78 if any setting is wrong, after all faults.
    """
    from relay.settings import GROUPS

    given, settings = _settings(env_file)
    for number, (group, members) in enumerate(GROUPS):
        click.secho(f"{chr(10) if number else ''}{group}", bold=True)
        for setting in members:
            click.echo(f"  {setting.name:<29} {_value(setting, given, settings)}")
            if verbose:
                click.echo(f"      {setting.meaning}\n      takes {setting.allowed}")


def _value(setting: Setting, given: Mapping[str, object], settings: Settings) -> str:
    """A setting's value in words: as it was written, or the default."""
    written = given.get(setting.name)
    if written is None:
        if setting.name == "RELAY_BIND" and settings.bind != setting.default:
            return f"{settings.bind} (from PORT)"
        return f"{setting.default} (default)" if setting.default else "-"
    if not str(written).strip():
        return "(empty)"
    return "(set, not shown)" if setting.secret else str(written).strip()


@commands.command("check-key", short_help="Ask the upstream whether it takes the key.")
@env_file
def check_key(*, env_file: Path | None) -> None:
    """Ask the upstream whether it takes the key: GET RELAY_HEALTH_PATH, which costs nothing.

    Exit status 0: it does. 1: it refuses the key. 2: it cannot be reached. 3: it answers, but with something that
    says nothing of the key. 78: a setting is wrong, or there is no key. The key is never printed.
    """
    _, settings = _settings(env_file)
    if settings.upstream_url is None:
        _fail("RELAY_UPSTREAM_URL is not set: there is only the demo upstream, which needs no key.", os.EX_CONFIG)
    if not settings.adds_key:
        _fail(
            "RELAY_UPSTREAM_KEY is not set: the clients' own keys go upstream, and there is none to check.",
            os.EX_CONFIG,
        )

    from relay import errors
    from relay.upstream.endpoint import Upstream

    host, asked = settings.upstream_host, f"GET {settings.health_path.partition('?')[0]}"
    started = time.monotonic()
    try:
        status = Upstream(settings, settings.upstream_url).probe(
            f"/{settings.health_path}", within=settings.health_timeout
        )
    except errors.RelayError as error:
        _fail(f"{host} cannot be asked: {error.message}.", _UNREACHABLE)
    except OSError as error:  # the files that connecting needs: RELAY_UPSTREAM_CA, certifi's own
        _fail(f"{host} cannot be asked: {error.strerror or error}; is RELAY_UPSTREAM_CA sound?", _UNREACHABLE)
    took = (time.monotonic() - started) * 1000
    if status in (401, 403):
        _fail(f"{host} refuses the upstream key: it answered {status} to {asked}.", _REJECTED)
    if 300 <= status < 400:
        _fail(
            f"{host} answered {status} to {asked}, a redirect, which says nothing of the key and is not followed. "
            "Set RELAY_UPSTREAM_URL to the address that it leads to.",
            _UNDECIDED,
        )
    if status >= 400:
        _fail(
            f"{host} answered {status} to {asked}, which says nothing of the key. RELAY_HEALTH_PATH can name "
            "something else that costs nothing.",
            _UNDECIDED,
        )
    click.echo(f"{host} takes the upstream key: it answered {status} to {asked} after {took:.0f} ms.")


def _settings(file: Path | None) -> tuple[Mapping[str, object], Settings]:
    """What is set, and the settings that it comes to. Ends with status 78 and every fault if some are wrong."""
    from relay.settings import Settings, SettingsError
    from relay.settings.environment import read

    if file is None and Path(".env").is_file():
        click.echo("Note: .env is not read; --env-file .env reads it.", err=True)
    try:
        given: dict[str, object] = dict(read(file))
        return given, Settings.from_mapping(given, service=True)
    except SettingsError as fault:
        _fail(str(fault), os.EX_CONFIG)


def _fail(sentence: str, status: int) -> NoReturn:
    click.echo(sentence, err=True)
    raise SystemExit(status)


def main() -> None:
    """Run the command line: the console script `relay`."""
    commands(prog_name="relay")
