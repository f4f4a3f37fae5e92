"""A request to a relay, from who may make it to the stream that carries it out. What all that goes upstream shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flask import Response, g

from relay import errors
from relay.gate.address import client_address, payer
from relay.gate.keys import client_name, shows_key_beside_authorization
from relay.gate.origin import check_host, check_origin, check_paid_get, check_peer, check_redirect
from relay.record import Record
from relay.stream.relayed import Headers, Stream
from relay.web.request import current_request
from relay.web.views import answers
from relay.wire.headers import CREDENTIALS, sane_request_id
from relay.wire.sse import HEARTBEAT, HEARTBEAT_AFTER_ID, MEDIA_TYPE
from relay.wire.target import allows

if TYPE_CHECKING:
    from relay.settings import Settings
    from relay.stream.relayed import Intake
    from relay.upstream.exchange import Exchange
    from relay.web.mount import Mount


class Call:
    """One request, whose origin, host and address may make it; its constructor raises Forbidden for another."""

    __slots__ = ("address", "asked", "budget", "client", "environ", "mount", "request_id")

    def __init__(self, mount: Mount) -> None:
        settings = mount.settings
        self.mount = mount
        self.asked = current_request()
        environ = self.environ = self.asked.environ
        self.request_id = answers.request_id(environ)
        self.address = client_address(environ, settings)
        self.client = ""  # whom it counts for, once `identify` has said so
        self.budget: Sequence[tuple[str, str]] = ()  # response headers that tell what is left of it
        if not mount.leaves_cors:
            check_origin(environ, settings)
        if mount.service:
            check_host(environ, settings)
            check_peer(self.address, settings)

    def identify(self, query: str | None) -> str | None:
        """Find out who calls, by a ticket in the raw query, a key or an address.

        Returns the query without what the client has shown in it. Raises Unauthorized.
        """
        keys = self.mount.keys
        holder, query = keys.take_ticket(query)
        if holder is None and (digest := keys.check(self.environ, query)) is not None:
            holder = client_name(digest)
        self.client = holder or payer(self.address)
        return keys.query_without_keys(query, own_credentials=self.mount.own_credentials)

    def headers(self) -> list[tuple[str, str]]:
        """The client's headers that may go upstream. Raises BadRequest for one that would not stay on its line."""
        return self.mount.keys.without_keys(self.mount.headers.select(self.environ))

    def paid_get(self) -> None:
        """Refuse a GET that costs money and may be a foreign page's. Raises Forbidden.

        A key or a ticket, where the relay asks for one, is a word that such a page cannot say.
        """
        if not self.mount.keys:
            check_paid_get(self.environ, self.mount.settings)

    def permit(self, method: str, path: str) -> None:
        """Raises Forbidden if this must not be called upstream."""
        permit(self.mount.settings, method, path)

    def count(self) -> None:
        """Take it from the client's budget. Raises TooMany."""
        if self.mount.rates is not None:
            self.budget = self.mount.rates.take(self.client)

    def overrides(self, record: Record) -> dict[str, str]:
        """The headers that the app's hook sets upstream; the record learns the tenant."""
        overrides = self.mount.call_hook()
        if overrides:
            record.own_key = CREDENTIALS.isdisjoint(map(str.lower, overrides))
        if self.mount.wants_model and (tenant := g.get("relay_tenant")) is not None:
            record.tenant = str(tenant)
        return overrides

    def record(self, *, route: str, model: str | None, asks_for_events: bool) -> Record:
        mount = self.mount
        return Record(
            request_id=self.request_id,
            method=self.asked.method,
            route=f"{mount.name}.{route}",
            client=self.address,
            owner=self.client,
            mount=mount.name,
            asks_for_events=asks_for_events,
            model=model,
            upstream_host=mount.settings.upstream_host,
        )

    def answer(self, begin: Callable[[Response, Callable[..., Any]], Iterable[bytes]]) -> Response:
        """A response that `begin` turns into a stream when Flask is done."""
        response = answers.deferred(begin, self.environ)
        for name, value in self.budget:
            response.headers[name] = value
        return response


def permit(settings: Settings, method: str, path: str) -> None:
    """Raises Forbidden if this must not be called upstream."""
    if not allows(settings.allow, method, path):
        raise errors.Forbidden(
            f"{method} on this path is not among what this relay passes on (RELAY_ALLOW)",
            code="path_not_allowed",
        )


def stream(
    mount: Mount,
    environ: Mapping[str, Any],
    exchange: Exchange | Intake,
    record: Record,
    response: Response,
    start_response: Callable[..., Any],
    *,
    settings: Settings | None = None,
    viewed: bool = False,
) -> Stream:
    """The stream of a call, when the server begins to write its response.

    It takes no Call: whatever this holds, the stream holds to its end. `settings`: others than the mount's.
    """
    # A hook of the app's may have given the request an id: there must not be two.
    of_the_app = list(response.headers)
    for name, value in of_the_app:
        if name.lower() == "x-request-id":
            record.request_id = sane_request_id(value) or record.request_id
    method, host, request_id = str(environ["REQUEST_METHOD"]), str(environ.get("HTTP_HOST", "")), record.request_id
    beside = shows_key_beside_authorization(environ)
    checks = not mount.trusts_upstream
    client = answers.client_socket(environ)
    if not mount.knows_server:
        mount.look_at_server(environ, client)

    def present(status: int, headers: Headers) -> Headers:
        if checks and 300 < status < 400:
            check_redirect(status, headers, method=method, host=host, key_beside=beside)
        return answers.complete(headers, of_the_app, request_id)

    return Stream(
        exchange,
        record,
        settings or mount.settings,
        start_response,
        client=client,
        http10=environ.get("SERVER_PROTOCOL") == "HTTP/1.0",
        present=present,
        admission=mount.admission,
        watch=mount,
        closed=response.close,
        viewed=viewed,
        # @microsoft/fetch-event-source makes an empty message of the blank line after a comment; clients that do not
        # ask for events by name (google-genai's in JavaScript) need it.
        comment=HEARTBEAT_AFTER_ID if MEDIA_TYPE in str(environ.get("HTTP_ACCEPT", "")).lower() else HEARTBEAT,
    )
