"""The house: imports point down only and in no circle, and what must stay light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import relay

PACKAGE = Path(relay.__file__).parent

# README.md, "Development". A new package gets its floor here: the lowest on which it can stand.
FLOORS = {
    0: ["errors", "version"],
    1: ["wire"],
    2: ["llm", "settings"],
    3: ["record", "observe", "client"],
    4: ["upstream", "shared"],
    5: ["gate"],
    6: ["stream"],
    7: ["textview"],
    8: ["web"],
    9: ["service", "cli"],
    10: ["gunicorn_conf", "worker", "__main__"],
}
FLOOR = {f"relay.{name}": floor for floor, names in FLOORS.items() for name in names}

# Imports that point up or back, each with its reason. None may run when its module is imported.
LATE = {
    ("relay.web.mount", "relay.upstream.demo"): "the embedded upstream is started by the first request that needs it",
    (
        "relay.stream.waiting",
        "relay.stream.waiting.hub",
    ): "which kind of waiter fits is known when the first stream begins",
    ("relay.stream.waiting", "relay.stream.waiting.threads"): "as above",
}

# What only one module may import, and what pure bytes have no use for.
HTTP_LIBRARIES = {"requests", "urllib3"}
ONLY_HERE = {
    "relay.upstream.endpoint": "waits for a probe with urllib3",
    "relay.upstream.connect": "its TLS contexts are urllib3's",
    "relay.client.connection": "the other end, where the environment's proxies and certificates count",
}
PURE = [
    "relay.wire.sse",
    "relay.wire.headers",
    "relay.errors",
    "relay.wire.http1",
    "relay.wire.target",
    "relay.wire.sse_parser",
    "relay.llm.answer",
    "relay.llm.prompt",
    "relay.textview.events",
    "relay.textview.head",
]
IMPURE = {
    "flask",
    "werkzeug",
    "requests",
    "urllib3",
    "socket",
    "ssl",
    "select",
    "gevent",
    "http",
    "threading",
    "asyncio",
}


def module_of(file: Path) -> str:
    parts = ("relay", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """Every module that the source of `module` imports, wherever in it and for whatever reason."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            source = node.module or ""
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.add(whole if whole in MODULES else source)
    return found - {module}


def floor_of(module: str) -> int:
    """The floor of a module, or of the folder that it stands in."""
    _, name, *_ = module.split(".")
    assert f"relay.{name}" in FLOOR, f"{module} has no floor: put it into FLOORS"
    return FLOOR[f"relay.{name}"]


def own_imports(module: str) -> set[str]:
    return {name for name in imports_of(module) if name in MODULES}


def other_roots(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(module) if name not in MODULES}


HOUSE = sorted(MODULES.keys() - {"relay"})  # the package itself only offers two names, when they are asked for


def test_every_module_has_a_floor() -> None:
    without = [module for module in HOUSE if f"relay.{module.split('.')[1]}" not in FLOOR]
    assert not without, "put it on its floor in FLOORS, and into README.md's table"


@pytest.mark.parametrize("module", HOUSE)
def test_imports_point_down(module: str) -> None:
    upwards = {name for name in own_imports(module) - {"relay"} if floor_of(name) > floor_of(module)}
    assert {name for name in upwards if (module, name) not in LATE} == set()


@pytest.mark.parametrize(("module", "imported"), [pytest.param(*pair, id="-".join(pair)) for pair in LATE])
def test_late_imports_are_there_and_wait(module: str, imported: str) -> None:
    assert imported in own_imports(module), "it is gone: strike it from LATE"
    assert imported not in modules_after(f"import {module}")


def test_no_imports_go_in_a_circle() -> None:
    seen: dict[str, bool] = {}  # False: on the way, True: done

    def walk(module: str, way: tuple[str, ...]) -> None:
        if seen.get(module) is False:
            pytest.fail(" -> ".join([*way, module]))
        if module in seen:
            return
        seen[module] = False
        for name in sorted(own_imports(module) - {"relay"}):
            if (module, name) not in LATE:
                walk(name, (*way, module))
        seen[module] = True

    for module in HOUSE:
        walk(module, ())


@pytest.mark.parametrize("module", HOUSE)
def test_only_these_modules_know_the_http_library(module: str) -> None:
    known = other_roots(module) & HTTP_LIBRARIES
    assert not known or module in ONLY_HERE


@pytest.mark.parametrize("module", PURE)
def test_bytes_know_no_sockets_and_no_framework(module: str) -> None:
    assert not other_roots(module) & IMPURE
    assert not modules_after(f"import {module}") & {"flask", "requests", "socket", "ssl"}


def modules_after(code: str, blocked: frozenset[str] = frozenset()) -> set[str]:
    """The names in sys.modules when a fresh interpreter has run `code`, in which `blocked` cannot be imported."""
    script = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(blocked)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
{code}
print(*sys.modules)
"""
    # -I: neither the environment nor the working directory has a say in what is imported.
    run = subprocess.run(
        [
            sys.executable,
            "-I",
            "-W",
            "error",
            "-c",
            f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{script}",
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize("module", ["relay", "relay.settings", "relay.settings.environment", "relay.service.cpus"])
def test_what_runs_before_gevent_has_patched_is_light(module: str) -> None:
    assert not modules_after(f"import {module}") & {
        "ssl",
        "flask",
        "requests",
        "urllib3",
        "gevent",
        "socket",
        "threading",
    }


def test_the_names_that_the_package_offers() -> None:
    assert "relay.web.extension" in modules_after("from relay import Relay")
    assert "relay.service.app" in modules_after("from relay import create_app")
    with pytest.raises(AttributeError, match="no attribute 'Rely'"):
        _ = relay.Rely


OPTIONAL = frozenset({"gevent", "greenlet", "gunicorn", "prometheus_client", "limits", "flask_cors", "dotenv"})


def test_a_mounted_relay_needs_flask_and_requests_alone() -> None:
    loaded = modules_after("import relay.web.extension", OPTIONAL)
    assert {"flask", "requests"} <= loaded
    modules_after(
        "from flask import Flask\n"
        "from relay import Relay\n"
        "app = Flask('shop')\n"
        "Relay(app, url_prefix='/ai', settings={'RELAY_UPSTREAM_URL': 'http://127.0.0.1:9'})\n"
        "assert app.test_client().get('/ai/_relay/health/live').status_code == 200\n",
        OPTIONAL,
    )


def test_mounting_starts_no_thread_and_opens_no_socket() -> None:
    """Celery workers and migrations import the app too."""
    modules_after(
        "import socket, threading\n"
        "from flask import Flask\n"
        "from relay import Relay\n"
        "def refuse(*args, **kwargs): raise AssertionError('opened something')\n"
        "socket.socket.__init__ = threading.Thread.start = refuse\n"
        "Relay(Flask('shop'), url_prefix='/ai', settings={'RELAY_UPSTREAM_URL': 'https://127.0.0.1:9'})\n"
        "assert threading.active_count() == 1\n"
    )
