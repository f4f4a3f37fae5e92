"""What every test has: the running service, the watchdog, and the servers' logs when one fails."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import SEED, servers
from harness.authority import Authority
from harness.client import Client
from harness.upstream import Upstream
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import FrameType

    from harness.browser import Console
    from harness.servers import Gunicorn, Nginx
    from playwright.sync_api import Browser, Page

#: Test processes for the whole suite: more than a small machine's cores, for most tests wait.
PROCESSES = 4
#: The files that take longest, which begin first so that no process is left alone with one at the end.
LONGEST = """
    power sdks upstreams_off ends soak failures property prompts bytes drain stream_machine js_client page js_cases
    aware doctor life shared_limits redis page_form chat_command freed life_nginx upstream_connections health_http docs
    deploy js_readme fuzz slowhttptest bench
""".split()

# How long an example takes is the machine's affair, and the watchdog's.
settings.register_profile(
    "patient",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(SEED),
    print_blob=True,
)
settings.load_profile("patient")

WATCHDOG = 120  # seconds for one test with its fixtures
_GRACE = 30  # more, until the process is ended because not even the alarm got through
_LOG_TAIL = 8000


_upstreams: list[Upstream] = []


@dataclass
class Service:
    """A relay in front of a scriptable upstream. `port` is where clients connect."""

    name: str
    upstream: Upstream
    relay: Gunicorn
    nginx: Nginx | None
    client: Client
    mount: str = "/v1"

    @property
    def port(self) -> int:
        return self.client.port


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that the relay's resolver returns in this process, which remembers no dead ones."""
    from relay.upstream import connect, dns

    found: list[Any] = []
    monkeypatch.setattr(dns, "resolve", lambda _host, _port: list(found))
    monkeypatch.setattr(connect, "_dead", {})
    return found


@pytest.fixture(scope="session")
def _servers() -> Iterator[tuple[Upstream, Gunicorn]]:
    with Upstream() as upstream:
        _upstreams.append(upstream)
        settings = {"RELAY_UPSTREAM_URL": upstream.base_url, "WEB_CONCURRENCY": "1"}
        with servers.gunicorn(settings) as relay:
            yield upstream, relay
        _upstreams.remove(upstream)


@pytest.fixture(scope="session")
def service(_servers: tuple[Upstream, Gunicorn]) -> Iterator[Service]:
    """The service as shipped, with one worker and no key, shared by the whole session."""
    upstream, relay = _servers
    with Client(relay.port) as client:
        yield Service("gunicorn", upstream, relay, None, client)


@pytest.fixture(scope="session")
def behind_nginx(_servers: tuple[Upstream, Gunicorn]) -> Iterator[Service]:
    """The same service behind the shipped nginx."""
    upstream, relay = _servers
    with servers.nginx(relay.port, relay.admin_port) as proxy, Client(proxy.port) as client:
        yield Service("nginx", upstream, relay, proxy, client)


@pytest.fixture(params=["gunicorn", "nginx"])
def hop(request: pytest.FixtureRequest) -> Service:
    """The service, once directly and once through nginx."""
    name = "service" if request.param == "gunicorn" else "behind_nginx"
    found: Service = request.getfixturevalue(name)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for one module: while it runs the process has an asyncio loop, which others' asyncio.run would meet."""
    from harness.browser import chromium

    with chromium() as running:
        yield running


@pytest.fixture
def _page(browser: Browser) -> Iterator[tuple[Page, Console]]:
    from harness.browser import new_page

    with new_page(browser) as opened:
        yield opened


@pytest.fixture
def page(_page: tuple[Page, Console]) -> Page:
    """A page in a browser context of its own. What it complains of on its console fails the test."""
    return _page[0]


@pytest.fixture
def console(_page: tuple[Page, Console]) -> Console:
    """The console of `page`, to say which errors are expected."""
    return _page[1]


@pytest.fixture(scope="module", autouse=True)
def _paths_are_a_files_own() -> Iterator[None]:
    """What a file has the session's upstream answer on a path of the API's meets no request of the next file's."""
    yield
    for upstream in _upstreams:
        upstream.forget_named()


@pytest.fixture(autouse=True)
def _nothing_failed_unseen() -> Iterator[None]:
    """No handler of the session's upstream failed, and nothing running logged a traceback."""
    servers.fallen.clear()
    for server in servers.running:
        server.mark()
    yield
    for upstream in _upstreams:
        upstream.check()
    for server in servers.running:
        server.check()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` is. For some tests, named by -k, -m or a path, collecting them all in each takes longer."""
    some = config.option.keyword or config.option.markexpr or config.args_source is config.ArgsSource.ARGS
    return 0 if some else PROCESSES


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a process of several: the longest files first, otherwise the order stays."""
    if not hasattr(config, "workerinput"):
        return
    here = Path(__file__).parent
    if unknown := [name for name in LONGEST if not any(here.glob(f"{at}test_{name}.py") for at in ("", "hosts/"))]:
        raise pytest.UsageError(f"tests/conftest.py LONGEST names files that are not there: {' '.join(unknown)}")
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The servers' logs of a failed test belong to its report."""
    report = yield
    if report.failed:
        for server in servers.running:
            text = server.log_since_mark()[-_LOG_TAIL:]
            report.sections.append((f"log of {server.name} on {server.port}, this test", text))
        for name, text in servers.fallen:
            report.sections.append((f"log of {name}, ended", text[-_LOG_TAIL:]))
    return report


class WatchdogExpired(BaseException):
    """A test took too long. No Exception, so that nothing on the way takes it for its own."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"watchdog(seconds): another limit than {WATCHDOG} s")
    # Before the capture of the first test: where a stuck session can still say why.
    config.stash[_STDERR] = os.dup(2)
    # Ignored when the run is in the background, and then by the programs under test as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    with contextlib.suppress(KeyError):
        os.close(config.stash[_STDERR])


_STDERR = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """After the limit all threads' tracebacks, and the test fails; later still the process ends."""
    marker = item.get_closest_marker("watchdog")
    seconds: float = marker.args[0] if marker else WATCHDOG
    stderr = item.config.stash[_STDERR]

    def expired(number: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(stderr)
        raise WatchdogExpired(f"{item.nodeid} ran for more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
