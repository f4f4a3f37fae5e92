"""What README.md says is so: its tables are the code's, its examples run, its files are there."""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness import REPO, eventually, servers
from harness.client import request
from harness.upstream import Upstream
from test_floors import FLOORS

from relay.observe import metrics
from relay.settings import SETTINGS
from relay.wire import fronts, headers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from harness.servers import Gunicorn

README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SERVICE = "127.0.0.1:8000"  # what the examples call


def section(title: str) -> str:
    """The text under a heading, up to the next one of its level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README has no section {title!r}"
    return found[2]


def first_cells(text: str, column: int = 0) -> list[str]:
    """What stands in backticks in one column of the tables of a text, a row each."""
    rows = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|"))
    cells = (row[column] for row in rows if len(row) > column)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)[:1]]


def block(*marks: str) -> str:
    """The one code block that has all these texts in it."""
    (found,) = (code for _, code in BLOCKS if all(mark in code for mark in marks))
    return found


def _script(path: Path) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(path.name.replace("-", "_"), str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


# --- Tables


def test_the_table_of_settings_is_that_of_the_code() -> None:
    """After a change: `tools/settings-table --write`."""
    tool = _script(REPO / "tools/settings-table")
    assert tool.written(README) == README
    assert set(tool.NOTES) <= {setting.name for setting in SETTINGS}


def test_every_setting_that_is_named_exists() -> None:
    # The first two are Kubernetes', the last is the doctor's.
    named = set(re.findall(r"\bRELAY_[A-Z_]*[A-Z]\b", README)) - {"RELAY_PORT", "RELAY_SERVICE", "RELAY_CLIENT_KEY"}
    assert named == {setting.name for setting in SETTINGS}


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    assert [name for name in first_cells(section("What it answers")) if name.startswith("relay_")] == list(
        metrics.NAMES
    )


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """The relay's modules, a package under its own name."""
    for path in sorted((REPO / "relay").rglob("*.py")):
        name = path.relative_to(REPO / "relay").parts[0].removesuffix(".py")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def error_codes() -> set[str]:
    """The codes of all errors that some line in relay/ makes."""
    of_class: dict[str, str] = {}
    made: set[str] = set()
    calls: list[tuple[str, list[ast.keyword]]] = []
    for name, tree in _modules():
        for node in ast.walk(tree):
            if name == "errors" and isinstance(node, ast.ClassDef):
                of_class[node.name] = _class_attribute(node, "code") or of_class.get("RelayError", "")
            if isinstance(node, ast.Call):
                function = node.func
                called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                calls.append((called, node.keywords))
            if isinstance(node, ast.IfExp):  # errors.BadRequest if … else errors.RelayError
                calls += [(each.attr, []) for each in (node.body, node.orelse) if isinstance(each, ast.Attribute)]
    for called, keywords in calls:
        if called in of_class:
            code = next((word.value for word in keywords if word.arg == "code"), None)
            made.add(code.value if isinstance(code, ast.Constant) else of_class[called])
    return made


def _class_attribute(node: ast.ClassDef, name: str) -> str:
    """A text that a class body assigns, alone or in a tuple."""
    for statement in node.body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target, value = statement.targets[0], statement.value
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            values = value.elts if isinstance(value, ast.Tuple) and isinstance(target, ast.Tuple) else [value]
            for one, its in zip(targets, values, strict=True):
                if isinstance(one, ast.Name) and one.id == name and isinstance(its, ast.Constant):
                    return str(its.value)
    return ""


def test_the_table_of_errors_is_that_of_the_code() -> None:
    text = section("What it answers")
    told = first_cells(text[text.index("| status | code |") : text.index("¹ The request")], 1)
    assert set(told) == error_codes()
    assert len(told) == len(set(told))


def test_the_codes_of_nginx_are_told_too() -> None:
    text = (REPO / "nginx/snippets/relay-upstream.conf").read_text()
    codes = re.findall(r'"(\w+)"', text[text.index("$relay_error_code") : text.index("$relay_error_type")])
    assert codes
    assert [code for code in codes if f"`{code}`" not in README] == []


def end_reasons() -> set[str]:
    """Every reason that relay/ gives a stream's end."""
    reasons: set[str] = set()
    for name, tree in _modules():
        for node in ast.walk(tree):
            if name == "errors" and isinstance(node, ast.ClassDef):
                reasons.add(_class_attribute(node, "reason"))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_end":
                reasons |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                named = (target.attr for target in node.targets if isinstance(target, ast.Attribute))
                if "_broken" in named:
                    reasons.add(node.value.value)
    return reasons - {"", "None"}


def test_the_table_of_ends_is_that_of_the_code() -> None:
    text = section("A stream's life")
    assert set(first_cells(text[text.index("| reason |") :])) == end_reasons()


def test_every_route_is_told() -> None:
    code = (
        "from relay import create_app; print(*(str(rule) for rule in create_app({}).url_map.iter_rules()), sep='\\n')"
    )
    env = servers.environment({"PYTHONPATH": str(REPO)})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    routes = {re.sub(r"^/v1", "{mount}", route) for route in done.stdout.split() if route.startswith("/")}
    routes = {re.sub(r"(?<=.)/(<.*>)?$", "/…", route) for route in routes}
    assert "/health" in routes
    assert [
        route for route in routes if not re.search(rf"`((GET|POST) )?{re.escape(route)}`", section("What it answers"))
    ] == []


def test_every_header_that_is_not_passed_on_is_told() -> None:
    """The lists in the module are those in the README."""
    lists = [value for value in vars(headers).values() if isinstance(value, (frozenset, tuple))]
    names = {name for each in lists for name in each if isinstance(name, str)}
    for families in (fronts.ADDED, fronts.ORDERS):  # of these there are too many: README names the file
        names -= {name for each in fronts.split(families) for name in each}
    assert "(relay/wire/fronts.py)" in section("Headers")
    names -= headers._LOGINS
    names -= {"content-type"}  # it goes through; what is dropped is another header that some servers take for it
    assert {"cookie", "te", "x-auth-token"} <= names
    told = section("Headers").lower()
    assert [name for name in names if not re.search(rf"[`*]{re.escape(name)}\*?`", told)] == []


def test_the_upstream_gets_none_of_the_headers_that_are_named_as_never_going_there() -> None:
    never = section("Headers").split("**Never upstream:**")[1].split("**Never back:**")[0]
    named = [name for name in re.findall(r"`([A-Za-z][A-Za-z0-9-]*\*?)`", never) if name != "identity"]
    assert len(named) > 30
    environ = {f"HTTP_{name.upper().replace('-', '_').replace('*', 'X')}": "1" for name in named}
    kept = headers.RequestHeaders(own_credentials=True).select({**environ, "HTTP_X_MINE": "1"})
    assert kept == [("X-Mine", "1")]


def test_none_of_the_headers_that_are_named_as_never_coming_back_do() -> None:
    never = section("Headers").split("**Never back:**")[1].split("**Always back:**")[0]
    named = re.findall(r"`(\*?[A-Za-z][A-Za-z0-9-]*\*?)`", never)
    assert len(named) > 20
    upstream = [(name.replace("*", "X"), "from-upstream") for name in named]
    fields = {"content-type": "text/event-stream"}
    back = headers.response_headers([*upstream, ("X-Mine", "1")], fields, has_body=True)
    assert [pair for pair in back if pair[1] == "from-upstream"] == []
    assert ("X-Mine", "1") in back


# --- Examples


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[0])
def test_every_python_block_compiles(code: str) -> None:
    compile(code, "README.md", "exec")


@pytest.fixture(scope="module")
def demo() -> Iterator[Gunicorn]:
    """What `make run` starts with nothing configured."""
    with servers.gunicorn({}) as relay:
        yield relay


def test_the_curl_example_streams(demo: Gunicorn) -> None:
    assert shutil.which("curl"), "this test needs curl (apt-get install curl): it is not installed"
    example = block("curl -N", "chat/completions")
    assert SERVICE in example
    command = shlex.split(example.replace("\\\n", " ").replace(SERVICE, f"127.0.0.1:{demo.port}"))
    done = subprocess.run([*command, "-sS"], capture_output=True, text=True, check=True, timeout=30)
    events = [event for event in done.stdout.split("\n\n") if event]
    assert events[-1] == "data: [DONE]"
    words = [
        json.loads(event.removeprefix("data: "))["choices"][0]["delta"].get("content", "") for event in events[:-1]
    ]
    assert "You said: “Hello”." in "".join(words)


def test_the_examples_of_the_prompt_endpoints_stream(demo: Gunicorn) -> None:
    assert shutil.which("curl"), "this test needs curl (apt-get install curl): it is not installed"
    example = block("curl -N", "/stream/aware").replace("\\\n", " ")
    for line, marks in zip(
        [line for line in example.splitlines() if line],
        (
            ["chat.completion.chunk", "data: [DONE]"],
            ["event: batch", "event: final", "event: done"],
            ["id: ", "event: message\ndata: Hello\n", "event: done"],
            ["event: stream_id", "event: message\ndata: Hello\n", "event: done"],
            ["no open stream of this id"],
        ),
        strict=True,
    ):
        command = shlex.split(line.replace(SERVICE, f"127.0.0.1:{demo.port}"))
        done = subprocess.run([*command, "-sS"], capture_output=True, text=True, check=True, timeout=30)
        assert [mark for mark in marks if mark not in done.stdout] == []


def test_the_openai_example_prints_the_answer(demo: Gunicorn) -> None:
    example = block("from openai import OpenAI")
    assert SERVICE in example
    code = example.replace(SERVICE, f"127.0.0.1:{demo.port}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert "You said: “Hello”." in done.stdout


@contextlib.contextmanager
def shop(
    code: str, folder: Path, upstream: Upstream, worker: str = "gevent", ready: str | None = None, **more: str
) -> Iterator[Gunicorn]:
    """A README's app under gunicorn, its upstreams replaced; `ready`: as for gunicorn; `more`: of the environment."""
    replaced, count = re.subn(r"https://api\.\w+\.com/v1", upstream.base_url, code)
    assert count, "the example names no upstream"
    (folder / "shop.py").write_text(replaced, encoding="utf-8")
    env = {"PYTHONPATH": str(folder), "ANTHROPIC_API_KEY": "key-for-anthropic", **more}
    with servers.gunicorn(env, "shop:app", None, ["-k", worker, "--threads", "8"], ready=ready) as running:
        yield running


@pytest.mark.parametrize("worker", ["gevent", "gthread"])
def test_three_lines_mount_it(tmp_path: Path, worker: str) -> None:
    with Upstream(base_path="/v1") as upstream:
        path = upstream.by_hand("/chat/completions")
        with shop(block('Relay(app, url_prefix="/ai")', "RELAY_UPSTREAM_URL"), tmp_path, upstream, worker) as app:
            answer = _begin(app.port, "/ai/chat/completions")
            ex = upstream.next(path)
            assert ex.target == b"/v1/chat/completions"
            ex.head(headers=[("Content-Type", "text/event-stream")])
            ex.send(b"data: 1\n\n")
            response = answer.read_head()
            assert response.read_event() == b"data: 1\n\n"
            ex.end()
            assert response.finish() == (b"data: 1\n\n", "clean", "last chunk")
            assert request(app.port, "GET", "/ai/_relay/health/live").status == 200


def _begin(port: int, target: str):
    from harness.client import Connection

    connection = Connection(port)
    connection.send("POST", target, {"Content-Type": "application/json"}, b'{"stream": true}')
    return connection


def test_several_upstreams_with_a_login_and_a_key_for_each_tenant(tmp_path: Path) -> None:
    def ok(ex) -> None:
        ex.reply(b"{}")

    with Upstream(base_path="/v1") as upstream:
        upstream.serve(ok, "/chat/completions")
        upstream.serve(ok, "/messages")
        with shop(block("key_of_the_tenant", "anthropic"), tmp_path, upstream) as app:
            for path in ("/openai/v1/chat/completions", "/anthropic/v1/messages", "/openai/v1/_relay/health"):
                assert request(app.port, "GET", path).status == 401
            assert upstream.seen() == []

            tenant = {"X-Tenant": "acme", "Authorization": "Bearer of-the-client", "Cookie": "session=1"}
            assert request(app.port, "POST", "/openai/v1/chat/completions", tenant, b"{}").status == 200
            (ex,) = upstream.seen("/chat/completions")
            assert ex.all("Authorization") == [b"Bearer key-of-acme"]
            assert ex.all("X-Tenant") == ex.all("Cookie") == []
            assert request(app.port, "DELETE", "/openai/v1/files/x", tenant).status == 403

            assert request(app.port, "POST", "/anthropic/v1/messages", tenant, b"{}").status == 200
            (ex,) = upstream.seen("/messages")
            assert ex.all("x-api-key") == [b"key-for-anthropic"]
            assert ex.all("anthropic-version") == [b"2023-06-01"]
            assert ex.all("Authorization") == []
            assert request(app.port, "DELETE", "/anthropic/v1/messages", tenant).status == 403
            assert request(app.port, "GET", "/anthropic/v1/_relay/health/ready", tenant).status == 200


def test_the_nginx_example_serves_a_public_name_and_decides_who_may_call(tmp_path: Path) -> None:
    example = block("server_name relay.example.com")
    env = {"RELAY_ALLOW_ANONYMOUS": "on", "RELAY_UPSTREAM_KEY": "the-key"}
    with Upstream() as upstream, servers.gunicorn({"RELAY_UPSTREAM_URL": upstream.base_url, **env}) as relay:
        for network, status in (("127.0.0.0/8", 200), ("10.0.0.0/8", 403)):
            source = tmp_path / network.partition("/")[0]
            shutil.copytree(REPO / "nginx/snippets", source / "snippets")
            body, count = re.subn("allow 10.0.0.0/8", f"allow {network}", example)
            body, listens = re.subn(r"listen 80;.*", "listen 127.0.0.1:8080;", body)
            assert (count, listens) == (1, 1)
            (source / "nginx.conf").write_text(
                f"pid run/pid;\nevents {{}}\nhttp {{\naccess_log off;\n{_TEMPORARY}{body}}}\n"
            )
            with servers.nginx(relay.port, relay.admin_port, source=source) as proxy:
                host = {"Host": "relay.example.com"}
                assert request(proxy.port, "GET", "/v1/models", host).status == status
                assert request(proxy.port, "GET", "/health", host).status == 200
                assert request(proxy.port, "GET", "/metrics", host).status == 404


_TEMPORARY = "".join(f"{name}_temp_path run/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))


def test_a_log_line_has_the_fields_that_are_named_and_no_others(demo: Gunicorn) -> None:
    request(demo.port, "GET", "/v1/models", {"X-Request-ID": "the-line-of-the-readme"}).finish()
    eventually(lambda: re.search("the-line-of-the-readme.*\n", demo.log()) is not None, "the log line")
    (line,) = (line for line in demo.log().splitlines() if "the-line-of-the-readme" in line)
    told = section("As a service").split("**The log**")[1].split("**Signals.**")[0]
    assert set(re.findall(r"`(\w+)`", told)) == set(json.loads(line))


def test_the_health_report_has_the_fields_that_are_named_and_no_others(demo: Gunicorn) -> None:
    report = json.loads(request(demo.port, "GET", "/health").finish().data)
    example = json.loads(block('"reachable"'))
    assert report["upstream"].pop("demo") is True
    assert _shape(report) == _shape(example)


def _shape(value: object) -> object:
    return {name: _shape(each) for name, each in value.items()} if isinstance(value, dict) else None


def test_no_setting_is_read_in_vain() -> None:
    tool = _script(REPO / "tools/settings-table")
    assert [name for name, note in tool.NOTES.items() if "in effect yet" in note] == []


# --- Files, links, commands


def _slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_link_leads_somewhere() -> None:
    anchors = {_slug(heading) for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (REPO / target).exists(), target


def test_every_file_that_is_named_exists() -> None:
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|conf|md|txt|example|toml))`", prose))
    named |= set(re.findall(r"`((?:nginx|tests|tools|relay)/[\w./-]*)`", prose))
    named |= set(re.findall(r"\b(relay-[a-z-]+\.conf)\b", prose))
    assert "nginx/snippets/" in named
    elsewhere = {path.name for folder in ("nginx", "tests") for path in (REPO / folder).rglob("*")}
    assert [name for name in named if not (REPO / name).exists() and name not in elsewhere] == []


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (REPO / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert {"run", "up", "test"} <= named <= targets


def test_every_command_that_is_named_exists() -> None:
    from relay.cli.main import commands

    named = set(re.findall(r"`(?:(?:\.venv/bin/)?python -m )?relay ([a-z-]+)", README))
    assert named == set(commands.commands)


# --- The house


def test_the_house_is_drawn_as_it_stands() -> None:
    """tests/test_floors.py holds the code to it."""
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", section("Development"), re.MULTILINE)
    drawn = {int(floor): set(re.findall(r"`(\w+)/?`", said)) for floor, said in rows}
    assert drawn == {floor: set(names) for floor, names in FLOORS.items()}
