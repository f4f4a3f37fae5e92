"""The prompt endpoints: a chat request built from a prompt, answered as the upstream does or as plain text."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any

from flask import Response, request

from relay import errors
from relay.gate.models import check_named
from relay.llm.prompt import Pace, Prompt
from relay.observe import log
from relay.shared import reports
from relay.shared.reports import Presence
from relay.textview import Head, TextView
from relay.web.intake import Body, Intake
from relay.web.request import expected_body
from relay.web.views import answers, calls
from relay.web.views.calls import Call, permit

if TYPE_CHECKING:
    from relay.record import Record
    from relay.upstream.exchange import Exchange
    from relay.web.mount import Mount

#: What a client's headers say of its own body, of a page that it has, or of where a stream broke off: of another
#: request than the one that goes upstream.
_OF_THE_OLD_REQUEST = frozenset(
    "content-type content-encoding content-language content-location content-md5 content-digest repr-digest digest "
    "accept last-event-id if-match if-none-match if-modified-since if-unmodified-since if-range range".split()
)
#: Bytes of a prompt endpoint's body, which is parsed as a whole; a chat with pictures is for the relay itself.
_MOST_PROMPT = 1024 * 1024
#: Heartbeat intervals from one report of a client to the next, and the seconds if there are no heartbeats.
_INTERVALS, _WITHOUT_HEARTBEATS = 3, 45.0


def stream_chat(mount: Mount) -> Response:
    """The chat request built for a prompt; the upstream's stream comes back as it is."""
    call = _call(mount, "POST")
    intake, record = _intake(call, "stream_chat", event_source=False)
    record.asks_for_events = True
    environ = call.environ

    def begin(response: Response, start_response: Callable[..., Any]) -> Iterable[bytes]:
        return calls.stream(mount, environ, intake, record, response, start_response)

    return call.answer(begin)


def chat_stream(mount: Mount) -> Response:
    """The same as events of plain text; for pages, a GET too."""
    call = _call(mount, "GET", "POST")
    event_source = call.asked.method == "GET"
    if event_source:
        call.paid_get()
    if event_source and "HTTP_LAST_EVENT_ID" in call.environ:
        # An EventSource that connects again, as it does after any end, would ask, and bill, the same again. 204 stops
        # it for good (WHATWG HTML section 9.2.3).
        return answers.empty(204)
    return _text(call, "chat_stream", event_source=event_source)


def stream_aware(mount: Mount) -> Response:
    """The same for a client that may report in."""
    return _text(_call(mount, "POST"), "stream_aware", event_source=False, aware=True)


def stream_heartbeat(mount: Mount) -> Response:
    """A client of `stream_aware` reports in, at whichever worker."""
    call = _call(mount, "POST")
    stream_id = request.args.get("stream_id", "")
    if not stream_id:
        raise errors.BadRequest("stream_id is missing: the id that the event stream_id of the stream has told")
    if not reports.is_id(stream_id):
        raise errors.BadRequest("stream_id must be the 32 hexadecimal digits that the event stream_id has told")
    try:
        known = reports.report(stream_id, call.client)
    except OSError as error:
        raise _no_folder(error) from None
    if not known:
        raise errors.NotFound("this client has no open stream of this id")
    return answers.empty(204)


def _call(mount: Mount, *methods: str) -> Call:
    """Who calls, if with one of these methods."""
    call = Call(mount)
    if call.asked.method not in methods:
        refusal = errors.MethodNotAllowed(f"this path takes {' and '.join(methods)} only")
        refusal.fields = [("Allow", ", ".join(methods))]
        raise refusal
    call.identify(request.query_string.decode("latin-1"))
    return call


def _intake(
    call: Call, route: str, *, event_source: bool, heard: Callable[[Prompt], None] | None = None
) -> tuple[Intake, Record]:
    """What reads the client's prompt and makes the request upstream of it; `heard` is told of the prompt."""
    mount, asked = call.mount, call.asked
    settings = mount.settings
    call.count()
    query = asked.args
    given = Prompt.of_query(query, settings.chat_model) if event_source else None
    headers = [pair for pair in call.headers() if pair[0].lower() not in _OF_THE_OLD_REQUEST]
    headers += [("Content-Type", "application/json"), ("Accept", "text/event-stream")]
    record = call.record(route=route, model=None, asks_for_events=False)
    overrides = call.overrides(record)

    def finish(body: Body) -> Generator[None, None, Exchange]:
        prompt = given or (yield from Prompt.of_body(body, query, settings.chat_model))
        yield  # a long prompt has taken its time
        path, chat = prompt.for_anthropic() if mount.speaks_anthropic else prompt.for_openai()
        permit(settings, "POST", path)
        if settings.models is not None:
            check_named(prompt.model, settings.models)
        record.model = prompt.model
        if heard is not None:
            heard(prompt)
        overrides["X-Request-ID"] = record.request_id
        return mount.upstream.exchange("POST", f"/{path}", None, headers, chat, overrides)

    expected = None if event_source else expected_body(asked, min(settings.max_body, _MOST_PROMPT), "a prompt's bound")
    return Intake(call.environ, expected, mount.body_memory, finish), record


def _text(call: Call, route: str, *, event_source: bool, aware: bool = False) -> Response:
    """A prompt's answer as events of text."""
    mount, environ = call.mount, call.environ
    views: list[TextView] = []
    intake, record = _intake(
        call, route, event_source=event_source, heard=lambda prompt: views.pop().set_pace(prompt.pace)
    )
    within = max(_INTERVALS * mount.settings.heartbeat, 1.0) if mount.settings.heartbeat else _WITHOUT_HEARTBEATS

    def begin(response: Response, start_response: Callable[..., Any]) -> Iterable[bytes]:
        head = Head()
        stream = calls.stream(
            mount, environ, intake, record, response, head, settings=mount.without_heartbeats, viewed=True
        )
        view = TextView(
            stream,
            head,
            mount.settings,
            Pace(),
            start_response,
            complete=lambda headers: answers.complete(headers, list(response.headers), record.request_id),
            event_source=event_source,
            presence=Presence(record.owner, within) if aware else None,
        )
        views.append(weakref.proxy(view))
        return view

    if aware:
        try:
            reports.folder()
        except OSError as error:
            raise _no_folder(error) from None
    return call.answer(begin)


def _no_folder(error: OSError) -> errors.RelayError:
    log.logger.error("request %s: no client can report in: %s", answers.request_id(request.environ), error)
    return errors.RelayError("the relay has no place to note reports in; its log says why under this request id")
