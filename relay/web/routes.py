"""What a relay serves beside the relay itself, in parts that can be left out: routes, below the service's root or a
mounted relay's `{prefix}/_relay/`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

from relay.web.views import files, prompts

if TYPE_CHECKING:
    from flask import Response

    from relay.web.mount import Mount

#: All there are, and what a mounted relay serves if nothing else is said.
PARTS = ("prompts", "scripts", "page")
MOUNTED = ("prompts", "scripts")

_SCRIPTS = ("relay-client.js", "relay-client.d.ts", "use-streaming-chat.js", "use-streaming-chat.d.ts")
_OF_THE_PAGE = (
    "page.css",
    "page.js",
    "page-answer.js",
    "page-gaps.js",
    "page-health.js",
    "page-log.js",
    "page-measure.js",
    "favicon.svg",
)


class Route(NamedTuple):
    """`path` without a leading slash. The view is asked whatever the method is, and refuses those it does not take."""

    path: str
    view: Callable[[Mount], Response]

    @property
    def endpoint(self) -> str:
        return self.path.replace("/", "_").replace(".", "_") or "page"


def check(names: Collection[str]) -> frozenset[str]:
    """Names of parts, known ones; the page brings the others, of which it is made. Raises ValueError for another."""
    if isinstance(names, str):
        raise ValueError(f"parts must be a collection of names, such as ({names!r},)")  # noqa: TRY004
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise ValueError(f"there are no parts called {', '.join(unknown)}; known are {', '.join(PARTS)}")
    return frozenset(PARTS if "page" in names else names)


def routes(names: Collection[str]) -> Iterator[Route]:
    """The routes of these parts."""
    if "prompts" in names:
        yield Route("api/stream-chat", prompts.stream_chat)
        yield Route("chat/stream", prompts.chat_stream)
        yield Route("stream/aware", prompts.stream_aware)
        yield Route("stream/heartbeat", prompts.stream_heartbeat)
    if "scripts" in names:
        yield from (Route(name, files.StaticFile(files.FOLDER / name)) for name in _SCRIPTS)
    if "page" in names:
        yield Route("", files.StaticFile(files.FOLDER / "page.html", files.OF_A_PAGE))
        yield from (Route(name, files.StaticFile(files.FOLDER / name)) for name in _OF_THE_PAGE)
