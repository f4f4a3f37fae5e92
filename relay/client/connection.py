"""One request over requests' adapter, and its body in the pieces in which it arrives.

The readers that requests offers hold bytes back until a chunk, a line or a buffer is full; urllib3's `read1` hands over
what is there. Redirects are not followed and `.netrc` is not read: a key goes where it was meant to go and nowhere
else. The environment's proxies and certificate bundle (`HTTPS_PROXY`, `NO_PROXY`, `REQUESTS_CA_BUNDLE`) count, as they
do for other clients. Knows nothing of events.
"""

from __future__ import annotations

import ipaddress
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, NewConnectionError, ProtocolError, ReadTimeoutError

from relay.client.errors import Cut, NotAnEventStream, Refused, Stalled, StreamError, Unreachable
from relay.wire.sse import is_event_stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay.client.request import Request

_CONNECT = 10.0  # seconds for each address of the host; a `timeout` that is shorter counts
_READ_SIZE = 65536
_MOST_OF_AN_ERROR = 64 * 1024


class Connection:
    """An answer that has begun, status 200 and an event stream. `close()` ends it at once, from any thread."""

    def __init__(self, request: Request, *, timeout: float | None, ca: str | None) -> None:
        """Send the request and wait for the head of the answer. Raises StreamError, and ValueError for a bad `ca`."""
        self._host = request.host
        self._timeout = timeout
        self._lock = threading.Lock()
        self._closed = self._reading = False
        self._session = requests.Session()
        self.request_id: str | None = None
        self.status: int | None = None
        try:
            self._response = self._send(request, ca)
            self._raw: Any = self._response.raw
            self.status = self._response.status_code
            headers = self._response.headers
            self.request_id = headers.get("X-Request-ID") or headers.get("request-id")
            self._check()
        except BaseException:
            self.close()
            raise

    def _send(self, request: Request, ca: str | None) -> requests.Response:
        if ca is not None and not Path(ca).exists():
            raise ValueError(f"{ca!r}, the bundle of certificates to trust, does not exist")
        prepared = requests.Request("POST", request.url, request.headers, data=request.body, auth=_unchanged).prepare()
        settings = self._session.merge_environment_settings(request.url, {}, stream=True, verify=ca or True, cert=None)
        proxies = {} if _loopback(request.url) else settings["proxies"]
        connect = _CONNECT if self._timeout is None else min(_CONNECT, self._timeout)
        adapter = HTTPAdapter(max_retries=0)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        try:
            return adapter.send(
                prepared,
                stream=True,
                timeout=(connect, self._timeout),  # type: ignore[arg-type]  # a None in it means what it says
                verify=settings["verify"] or True,
                proxies=proxies,
            )
        except (requests.RequestException, HTTPError, OSError) as error:
            raise self._not_answered(error) from None

    def _not_answered(self, error: Exception) -> StreamError:
        chain = list(_chain(error))
        if isinstance(error, requests.ConnectTimeout):
            return Unreachable(f"{self._host} cannot be reached: no connection in time")
        if isinstance(error, requests.exceptions.SSLError):
            return Unreachable(f"{self._host} cannot be trusted: {_said(chain)}", code="certificate")
        if isinstance(error, requests.exceptions.ProxyError):
            return Unreachable(f"the proxy on the way to {self._host} does not connect: {_said(chain)}")
        if any(isinstance(each, (ReadTimeoutError, TimeoutError)) for each in chain):
            return Stalled(f"{self._host} has not answered within {self._timeout:g} s")
        if any(isinstance(each, ProtocolError) for each in chain) and not any(
            isinstance(each, NewConnectionError) for each in chain
        ):
            return Cut(f"{self._host} ended the connection before it had answered: {_said(chain)}")
        return Unreachable(f"{self._host} cannot be reached: {_said(chain)}")

    def _check(self) -> None:
        """Raise what the answer says, if it is not an event stream."""
        status, headers = self._response.status_code, self._response.headers
        if status == 200 and is_event_stream(headers.get("Content-Type", "")):
            return
        if status == 200:
            media = headers.get("Content-Type", "").partition(";")[0] or "no media type"
            raise NotAnEventStream(
                f"{self._host} answered with {media}, not with an event stream; is the base URL right?",
                status=status,
                request_id=self.request_id,
            )
        said = _error_in(self._beginning())
        reason = said.get("message") or self._response.reason or "no reason given"
        if 300 <= status < 400 and (location := headers.get("Location")):
            # The key is for the host that was named.
            reason = (
                f"a redirect to {_place(location)}, which is not followed; name that as the base URL if it is right"
            )
        retry_after = headers.get("Retry-After", "")
        raise Refused(
            f"{self._host} answered {status}: {reason}",
            code=said.get("code") or said.get("type"),
            status=status,
            request_id=said.get("request_id") or self.request_id,
            retry_after=float(retry_after) if retry_after.strip().isdecimal() else None,
        )

    def _beginning(self) -> bytes:
        """What comes of an error's body; that it is cut or slow is of no interest."""
        body = b""
        try:
            while len(body) < _MOST_OF_AN_ERROR and (data := self._raw.read1(_READ_SIZE, decode_content=True)):
                body += data
        except (HTTPError, OSError):
            pass
        return body

    def read(self) -> bytes:
        """The next bytes of the body, as soon as there are any; empty: it has come to its end.

        Raises Cut if the connection broke off or was closed here, Stalled.
        """
        try:
            with self._lock:
                if self._closed:
                    raise self._was_closed()
                self._reading = True
            data = self._next_bytes()
            with self._lock:
                self._reading = False
                if self._closed:  # by another thread, which has left the rest to this one
                    raise self._was_closed()
                self._closed = not data
        except BaseException:  # Ctrl-C as well: the upstream is to stop
            with self._lock:
                self._reading = False
                self._closed = True
            self._free()
            raise
        if not data:
            self._free()
        return data

    def _next_bytes(self) -> bytes:
        told: dict[str, Any] = {"status": self.status, "request_id": self.request_id}
        try:
            data: bytes = self._raw.read1(_READ_SIZE, decode_content=True)
            return data
        except ReadTimeoutError:
            raise Stalled(f"nothing came from {self._host} for {self._timeout:g} s", **told) from None
        except (HTTPError, OSError, ValueError):  # ValueError: the file's own, if it was closed meanwhile
            if self._closed:
                raise self._was_closed() from None
            raise Cut(f"the connection to {self._host} broke off inside the answer", **told) from None

    def _was_closed(self) -> Cut:
        return Cut(
            "the stream was closed here before its end", code="closed", status=self.status, request_id=self.request_id
        )

    def close(self) -> None:
        """Close the connection, so that whatever writes to it stops. A read in another thread ends with Cut."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._reading:
                # Closing is the reader's: urllib3 cannot do it from here. This ends its wait (urllib3 before 2.3
                # has no such thing, and the reader goes on until something comes).
                shutdown = getattr(self._raw, "shutdown", None)
                if shutdown is not None:
                    try:
                        shutdown()
                    except (OSError, ValueError, RuntimeError):  # it has come to its end by itself
                        pass
                return
        self._free()

    def _free(self) -> None:
        response = getattr(self, "_response", None)
        if response is not None:
            response.raw.close()  # not the pool's: a connection with an answer on it is of no use to anyone
        self._session.close()


def _unchanged(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """In the place of requests' own authentication, which reads the URL."""
    return request


def _loopback(url: str) -> bool:
    """Whether a proxy would look for the host on its own machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _place(location: str) -> str:
    """Where a redirect leads, for people: without user, query and fragment, which may hold secrets."""
    try:
        parts = urlsplit(location)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "a malformed URL"
    place = f"{parts.scheme}://{host}{parts.path}" if host else parts.path
    return "".join(filter(str.isprintable, place))[:200] or "nowhere"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it came from: as its arguments, its `reason`, or its context."""
    seen: list[BaseException] = []
    left: list[Any] = [error]
    while left:
        each = left.pop(0)
        if isinstance(each, BaseException) and not any(each is known for known in seen):
            seen.append(each)
            yield each
            left += [*each.args, getattr(each, "reason", None), each.__cause__, each.__context__]


def _said(chain: list[BaseException]) -> str:
    """The system's own words where there are any."""
    for each in reversed(chain):
        if isinstance(each, OSError) and (words := getattr(each, "verify_message", None) or each.strerror):
            return str(words)
    last = chain[-1]
    return str(last) or type(last).__name__


def _error_in(body: bytes) -> dict[str, str]:
    """What an error's body says of itself, in the shapes of OpenAI's, Anthropic's and most other APIs."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if isinstance(said, list) and said:  # Gemini's
        said = said[0]
    if not isinstance(said, dict):
        return {}
    error = said.get("error", said)
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        return {}
    found = {name: error.get(name, said.get(name)) for name in ("message", "code", "type", "request_id")}
    if not isinstance(found["message"], str):
        found["message"] = said.get("detail")
    return {name: str(value) for name, value in found.items() if isinstance(value, (str, int)) and value}
