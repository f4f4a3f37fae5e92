"""The Flask extension and its blueprint: which view is at which route. What the views do is in relay.web.views."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Flask, current_app
from werkzeug.routing import BaseConverter

from relay import errors
from relay.gate.keys import short_keys
from relay.observe import log
from relay.observe.metrics import metrics
from relay.settings import Settings
from relay.web import cors
from relay.web.mount import EndHook, HeadersHook, Mount
from relay.web.request import current_request, remember_body
from relay.web.routes import MOUNTED, check, routes
from relay.web.views import answers, relayed, state
from relay.wire.target import METHODS

if TYPE_CHECKING:
    from flask.blueprints import BlueprintSetupState


class _Rest(BaseConverter):
    """Everything below the mount. Unlike Flask's `path` it takes empty segments, and a leading slash."""

    regex = "(?s:.*?)"
    part_isolating = False
    weight = 200


class _EveryMethod(set[str]):
    """The methods that a rule names to those who list them. It takes any: the view refuses others, as JSON."""

    def __contains__(self, method: object) -> bool:
        return True


class Relay:
    """The Flask extension: mounts a relay to one upstream under a prefix.

    `url_prefix`: where; what follows it goes to the upstream. `name`: of the blueprint and the mount; each relay in
    an app needs its own. `settings`: the `RELAY_…` settings of this relay alone; without them they come from the
    app's config. `request_headers`: called in the request's context for each call, returns headers that are set on
    the request upstream in place of any others of their names. `on_end`: called with the `relay.record.Record` of each
    stream that has ended, for billing and audit; outside of any context of Flask's, and it must not block. What a
    `before_request` or `request_headers` leaves in `flask.g.relay_tenant` is the record's `tenant`. `parts`: what it
    serves below `{prefix}/_relay/` beside its health: `"prompts"` (the prompt endpoints), `"scripts"` (the JavaScript
    client), `"page"` (a page to try it on, which needs and so brings the others); `()` is none of them.

    Raises ValueError for an unknown part, TypeError for an `async def` as `request_headers` or `on_end`, and from
    `init_app` (and from the constructor, given an app) ValueError for a prefix with variables and for a name or
    prefix that another relay in the app has, SettingsError if a setting is wrong, and RuntimeError for an app that
    routes by host, or that would be without a guard that was given for another.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        url_prefix: str | None = None,
        name: str = "relay",
        settings: Mapping[str, object] | None = None,
        request_headers: HeadersHook | None = None,
        on_end: EndHook | None = None,
        parts: Collection[str] = MOUNTED,
    ) -> None:
        self.name = name
        self.url_prefix = url_prefix
        self.blueprint = _blueprint(name, check(parts))
        self._settings = settings
        for hook, function in (("request_headers", request_headers), ("on_end", on_end)):
            called = getattr(type(function), "__call__", None)  # noqa: B004 - an object's, which may be async as well
            if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called):
                raise TypeError(f"{hook} must be a plain function, and {function!r} is async; call it with asyncio.run")
        self._request_headers = request_headers
        self._on_end = on_end
        self._app: weakref.ref[Flask] | None = None  # the only one it has been given
        self._several = False  # it has been given more than one
        self._guards = ""  # when the guards were given: "before" or "after" the first app
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, *, url_prefix: str | None = None) -> None:
        """Register the blueprint. Nothing is opened or started: other programs import the app too."""
        given = app.config if self._settings is None else self._settings
        settings = Settings.from_mapping(given)
        mount = Mount(
            self.name,
            settings,
            request_headers=self._request_headers,
            on_end=self._on_end,
        )
        self._mount(app, mount, url_prefix or self.url_prefix or settings.mount)
        if weak := short_keys(settings.client_keys):
            log.logger.warning("relay %r: %s", self.name, weak)

    def init_service(self, app: Flask, settings: Settings) -> Mount:
        """Register the blueprint as the service's own, at its mount."""
        mount = Mount(self.name, settings, service=True)
        self._mount(app, mount, settings.mount)
        return mount

    def before_request(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Register a check that runs before each request to this relay, such as the shop's own login. A decorator.

        One given before the relay has an app holds for every app that it is given. One given afterwards holds for
        that app, and the relay can be given no other.

        Raises RuntimeError where it is not certain for which app the check is meant: none may be left without it.
        """
        if self._app is None:
            self._guards = "before"
            self.blueprint.before_request(function)
            return function
        app = self._app()
        if self._several or self._guards == "before" or app is None:
            raise RuntimeError(
                f"before_request of relay {self.name!r} came after init_app, and it is not certain for which app it is "
                "meant; give all checks before the first init_app, or make a Relay for each app in its factory"
            )
        self._guards = "after"
        app.before_request_funcs.setdefault(self.name, []).append(function)
        return function

    def _mount(self, app: Flask, mount: Mount, prefix: str) -> None:
        if self._guards == "after":
            raise RuntimeError(
                f"the checks of relay {self.name!r} were given for the app it has, and this one would be without them; "
                "give all checks before the first init_app, or make a Relay for each app in its factory"
            )
        if app.url_map.host_matching:
            raise RuntimeError("a relay cannot be mounted in an app that routes by host (host_matching=True)")
        if app.url_map.converters.setdefault("relay_rest", _Rest) is not _Rest:
            raise RuntimeError("another extension has registered a URL converter called relay_rest")
        mounts = app.extensions.setdefault("relay", {})
        if self.name in mounts:
            raise ValueError(f"the app has a relay called {self.name!r} already; give this one another name=")
        prefix = prefix.rstrip("/")
        if prefix and not prefix.startswith("/"):
            raise ValueError(f"url_prefix must begin with a slash: {prefix!r}")
        if "<" in prefix:
            raise ValueError(f"url_prefix must be plain text, without variables: {prefix!r}")
        if any(rule.rule == f"{prefix}/_relay/health" for rule in app.url_map.iter_rules()):
            raise ValueError(f"the app has a relay at {prefix or '/'} already; give {self.name!r} another url_prefix=")
        mounts[self.name] = mount
        metrics().prepare(self.name)
        app.register_blueprint(self.blueprint, url_prefix=prefix or None)
        across = None if mount.service else cors.hooks(app, mount.settings)
        if across:
            # Before the shop's own checks: a preflight brings no cookie and no key.
            app.before_request_funcs.setdefault(self.name, []).insert(0, across[0])
            app.after_request_funcs.setdefault(self.name, []).append(across[1])
        if not mount.service:
            # The first of the list runs last.
            app.after_request_funcs.setdefault(None, []).insert(0, answers.not_replaced)
        self._several = self._app is not None
        self._app = weakref.ref(app)


def _blueprint(name: str, parts: Collection[str]) -> Blueprint:
    blueprint = Blueprint(name, __name__)
    blueprint.url_value_preprocessor(remember_body)
    for rule, view in (("health", state.health), ("health/live", state.live), ("health/ready", state.ready)):
        endpoint = rule.replace("/", "_")
        blueprint.add_url_rule(f"/_relay/{rule}", endpoint, _at(name, endpoint, view), methods=["GET"])
    blueprint.add_url_rule("/_relay/ticks", "ticks", _at(name, "ticks", relayed.ticks_request), methods=["GET"])
    for route in routes(parts):
        blueprint.add_url_rule(
            f"/_relay/{route.path}",
            route.endpoint,
            _at(name, route.endpoint, route.view),
            methods=METHODS,
            provide_automatic_options=False,
        )
    relay = _at(name, "relay", relayed.relay_request)

    def everything_below(setup: BlueprintSetupState) -> None:
        if (
            setup.name_prefix
            or setup.name != name
            or setup.subdomain
            or name not in setup.app.extensions.get("relay", ())
        ):
            raise RuntimeError(
                f"the blueprint of relay {name!r} is registered by its init_app(app, url_prefix=...) alone: not by "
                "register_blueprint, in another blueprint, or under a subdomain"
            )
        prefix, endpoint = (setup.url_prefix or "").rstrip("/"), f"{name}.relay"
        setup.app.view_functions[endpoint] = relay
        setup.app.view_functions[f"{name}.upgrade"] = _at(name, "upgrade", relayed.upgrade_request)
        rules = [(f"{prefix}/", {"rest": ""}), (f"{prefix}/<relay_rest:rest>", None)]
        if not prefix and setup.app.extensions["relay"][name].service:
            del rules[0]  # of two rules for one path the first given wins, and the service's own / is its page
        for rule, defaults in rules:
            for websocket in (False, True):
                added = setup.app.url_rule_class(
                    rule,
                    endpoint=f"{name}.upgrade" if websocket else endpoint,
                    defaults=defaults,
                    strict_slashes=False,
                    merge_slashes=False,
                    websocket=websocket,
                )
                added.methods = _EveryMethod({"GET"} if websocket else METHODS)
                added.provide_automatic_options = False  # type: ignore[attr-defined]
                setup.app.url_map.add(added)

    blueprint.record(everything_below)
    blueprint.register_error_handler(errors.RelayError, answers.error_response)
    return blueprint


def _at(name: str, endpoint: str, view: Callable[..., Any]) -> Callable[..., Any]:
    """A view that is called with its relay's mount in the app that serves the request."""

    def bound(**arguments: Any) -> Any:
        answers.check_slashes(current_request().environ)
        return view(current_app.extensions["relay"][name], **arguments)

    # Extensions tell views apart by this name: what is said of one must not hold for all of them.
    bound.__name__ = bound.__qualname__ = f"{name}_{endpoint}"
    return bound
