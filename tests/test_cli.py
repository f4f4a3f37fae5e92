"""The command `relay`: what it prints, how it ends, and that it never prints a key or a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import REPO, servers
from harness.upstream import Upstream

from relay.settings import GROUPS, SETTINGS
from relay.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from harness.upstream import Exchange

KEY = "a-key-that-nobody-may-see"


def relay(folder: Path, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """`python -m relay` in a folder, with nothing but these settings."""
    done = subprocess.run(
        [sys.executable, "-m", "relay", *args],
        cwd=folder,
        env=servers.environment({"PYTHONPATH": str(REPO), "WEB_CONCURRENCY": "", **settings}),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert KEY not in said
    return done


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream(base_path="/v1") as found:
        yield found


# --- The command itself


def test_it_says_its_version(tmp_path: Path) -> None:
    done = relay(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"relay {__version__}\n")


@pytest.mark.parametrize("args", [["--help"], ["-h"]], ids=" ".join)
def test_help_names_the_commands(tmp_path: Path, args: list[str]) -> None:
    done = relay(tmp_path, *args)
    assert done.returncode == 0
    assert "settings" in done.stdout
    assert "check-key" in done.stdout


def test_a_wrong_command_is_a_sentence(tmp_path: Path) -> None:
    done = relay(tmp_path, "chekc-key")
    assert done.returncode == 2
    assert "No such command" in done.stderr


def test_the_console_script_is_this_command() -> None:
    assert 'relay = "relay.cli.main:main"' in (REPO / "pyproject.toml").read_text()


def test_asking_for_help_or_settings_loads_neither_flask_nor_requests() -> None:
    """They are for the moment in which one is in a hurry; and nothing may load ssl for whoever imports this."""
    code = (
        "import sys, relay.cli.main\n"
        "try: relay.cli.main.commands(['settings'], prog_name='relay')\n"
        "except SystemExit: print(sorted({'flask', 'requests', 'urllib3', 'ssl', 'gevent'} & set(sys.modules)))"
    )
    env = servers.environment({"PYTHONPATH": str(REPO)})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines()[-1] == "[]"


# --- relay settings


def lines(text: str) -> dict[str, str]:
    """What is said of each setting, by its name."""
    words = (line.strip().split(None, 1) for line in text.splitlines() if line.strip().startswith("RELAY_"))
    return dict(words)


def test_every_setting_is_shown_with_its_default(tmp_path: Path) -> None:
    done = relay(tmp_path, "settings")
    assert done.returncode == 0
    expected = {setting.name: f"{setting.default} (default)" if setting.default else "-" for setting in SETTINGS}
    assert lines(done.stdout) == expected
    for group, _ in GROUPS:
        assert f"{group}\n" in done.stdout


def test_what_is_set_is_shown_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        f"RELAY_UPSTREAM_URL=https://api.example/v1\nRELAY_UPSTREAM_KEY={KEY}\nRELAY_DRAIN=7\n"
    )
    shown = lines(
        relay(
            tmp_path,
            "settings",
            "--env-file",
            ".env",
            RELAY_DRAIN="1m",
            RELAY_ADMIN_BIND="",
            PORT="8123",
            RELAY_ALLOW_ANONYMOUS="on",
        ).stdout
    )
    assert shown["RELAY_UPSTREAM_URL"] == "https://api.example/v1"
    assert shown["RELAY_UPSTREAM_KEY"] == "(set, not shown)"
    assert shown["RELAY_DRAIN"] == "1m"  # the environment wins over the file
    assert shown["RELAY_ADMIN_BIND"] == "(empty)"
    assert shown["RELAY_BIND"] == "0.0.0.0:8123 (from PORT)"
    assert shown["RELAY_HOLD"] == "20s (default)"


def test_no_secret_is_shown(tmp_path: Path) -> None:
    secrets = {
        "RELAY_UPSTREAM_KEY": KEY,
        "RELAY_UPSTREAM_HEADERS": f'{{"x-other": "{KEY}"}}',
        "RELAY_UPSTREAM_QUERY": f"code={KEY}",
        "RELAY_UPSTREAM_PROXY": f"http://me:{KEY}@proxy.example:3128",
        "RELAY_CLIENT_KEYS": KEY,
        "RELAY_TICKET_SECRET": KEY,
        "RELAY_LIMITS_URL": f"redis://:{KEY}@redis.example:6379",
    }
    assert set(secrets) == {setting.name for setting in SETTINGS if setting.secret}
    done = relay(tmp_path, "settings", "-v", RELAY_UPSTREAM_URL="https://api.example/v1", **secrets)
    assert done.returncode == 0, done.stderr
    assert {lines(done.stdout)[name] for name in secrets} == {"(set, not shown)"}


def test_verbose_says_what_each_means_and_takes(tmp_path: Path) -> None:
    text = relay(tmp_path, "settings", "-v").stdout
    for setting in SETTINGS:
        assert setting.meaning in text
        assert setting.allowed in text


def test_all_faults_are_told_and_the_status_is_that_of_a_wrong_configuration(tmp_path: Path) -> None:
    done = relay(
        tmp_path,
        "settings",
        RELAY_HARTBEAT="5",
        RELAY_DRAIN="soon",
        RELAY_UPSTREAM_KEY=f"two {KEY}",
        RELAY_BIND="nowhere",
    )
    assert (done.returncode, done.stdout) == (os.EX_CONFIG, "")
    for name in ("RELAY_HEARTBEAT", "RELAY_DRAIN", "RELAY_UPSTREAM_KEY", "RELAY_BIND"):
        assert name in done.stderr


def test_a_dotenv_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"RELAY_DRAIN=\xff\xfe\n")
    done = relay(tmp_path, "settings", "--env-file", ".env")
    assert done.returncode == os.EX_CONFIG
    assert ".env cannot be read" in done.stderr


def test_a_strangers_dotenv_is_not_believed(tmp_path: Path) -> None:
    """It could name the host that the key of the environment is sent to."""
    (tmp_path / ".env").write_text("RELAY_UPSTREAM_URL=https://evil.example/v1\nRELAY_DRAIN=7\n")
    done = relay(tmp_path, "settings", RELAY_UPSTREAM_KEY=KEY, RELAY_UPSTREAM_URL="https://api.example/v1")
    assert lines(done.stdout)["RELAY_DRAIN"] == "25s (default)"
    assert "--env-file .env reads it" in done.stderr
    done = relay(tmp_path, "check-key", RELAY_UPSTREAM_KEY=KEY)
    assert "RELAY_UPSTREAM_URL is not set" in done.stderr


@pytest.mark.parametrize(("mode", "told"), [(0o644, True), (0o640, True), (0o600, False)])
def test_files_with_keys_that_others_can_read_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, told: bool
) -> None:
    from relay.settings.environment import open_to_others

    monkeypatch.chdir(tmp_path)
    for name in (".env", "keys"):
        (tmp_path / name).write_text(f"RELAY_UPSTREAM_KEY={KEY}\n")
        (tmp_path / name).chmod(mode)
    said = open_to_others({"RELAY_CLIENT_KEYS": "@keys"})
    assert ("chmod 600 .env keys" in said) is told
    assert KEY not in said


# --- relay check-key


def check(folder: Path, upstream: Upstream | str, **settings: str) -> subprocess.CompletedProcess[str]:
    url = upstream if isinstance(upstream, str) else upstream.base_url
    given = {"RELAY_UPSTREAM_URL": url, "RELAY_UPSTREAM_KEY": KEY, **settings}
    return relay(folder, "check-key", **given)


def test_a_key_that_is_taken(tmp_path: Path, upstream: Upstream) -> None:
    done = check(tmp_path, upstream)
    assert done.returncode == 0
    assert "takes the upstream key" in done.stdout
    (ex,) = upstream.seen("/models")
    assert ex.all("Authorization") == [b"Bearer " + KEY.encode()]


def test_the_key_goes_where_the_relay_would_put_it(tmp_path: Path, upstream: Upstream) -> None:
    upstream.serve(lambda ex: ex.reply(b"{}"), "/cheap")
    settings = {
        "RELAY_UPSTREAM_KEY_HEADER": "x-api-key",
        "RELAY_UPSTREAM_QUERY": "api-version=1",
        "RELAY_HEALTH_PATH": "cheap",
    }
    assert check(tmp_path, upstream, **settings).returncode == 0
    (ex,) = upstream.seen("/cheap")
    assert (ex.target, ex.all("x-api-key")) == (b"/v1/cheap?api-version=1", [KEY.encode()])


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused(tmp_path: Path, upstream: Upstream, status: int) -> None:
    upstream.serve(lambda ex: ex.reply(b'{"error": "' + KEY.encode() + b' is wrong"}', status), "/models")
    done = check(tmp_path, upstream)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"it answered {status} to GET models" in done.stderr


def _silent(ex: Exchange) -> None:
    ex.wait_gone()


def _garbage(ex: Exchange) -> None:
    ex.raw(b"SSH-2.0-OpenSSH_9.2\r\n")
    ex.abort()


def _hang_up(ex: Exchange) -> None:
    ex.abort()


@pytest.mark.parametrize("handler", [_silent, _garbage, _hang_up])
def test_an_upstream_that_cannot_be_asked(tmp_path: Path, upstream: Upstream, handler) -> None:
    upstream.serve(handler, "/models")
    done = check(tmp_path, upstream, RELAY_HEALTH_TIMEOUT="0.5")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be asked" in done.stderr


def test_an_upstream_that_is_not_there(tmp_path: Path) -> None:
    done = check(tmp_path, f"http://127.0.0.1:{servers.free_port()}")
    assert done.returncode == 2
    assert "Connection refused" in done.stderr


def test_a_bundle_of_authorities_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nnot one\n-----END CERTIFICATE-----\n")
    done = check(tmp_path, "https://127.0.0.1:9", RELAY_UPSTREAM_CA="ca.pem")
    assert done.returncode == 2
    assert "RELAY_UPSTREAM_CA" in done.stderr


def test_an_answer_that_says_nothing_of_the_key(tmp_path: Path, upstream: Upstream) -> None:
    upstream.serve(lambda ex: ex.reply(b"{}", 404), "/models")
    done = check(tmp_path, upstream)
    assert done.returncode == 3
    assert "RELAY_HEALTH_PATH" in done.stderr


@pytest.mark.parametrize("status", [301, 302, 307])
def test_a_redirect_says_nothing_of_the_key(tmp_path: Path, upstream: Upstream, status: int) -> None:
    """As from http to https, or to a login: nobody has looked at the key."""
    upstream.serve(lambda ex: ex.reply(b"", status, headers=[("Location", "/elsewhere")]), "/models")
    done = check(tmp_path, upstream)
    assert (done.returncode, done.stdout) == (3, "")
    assert f"answered {status} to GET models, a redirect" in done.stderr
    assert "RELAY_UPSTREAM_URL" in done.stderr
    assert upstream.seen("/elsewhere") == []


def test_no_upstream_and_no_key(tmp_path: Path, upstream: Upstream) -> None:
    for settings, missing in (
        ({}, "RELAY_UPSTREAM_URL is not set"),
        ({"RELAY_UPSTREAM_URL": upstream.base_url}, "RELAY_UPSTREAM_KEY is not set"),
        ({"RELAY_UPSTREAM_URL": upstream.base_url, "RELAY_DRAIN": "soon"}, "RELAY_DRAIN"),
    ):
        done = relay(tmp_path, "check-key", **settings)
        assert done.returncode == os.EX_CONFIG
        assert missing in done.stderr
    assert upstream.seen() == []
