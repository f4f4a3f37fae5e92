"""The relay that most Flask apps have: requests, and a generator around `iter_lines`. A peer, not an example.

It has no time limits, no heartbeat, no limits and no metrics, and closes the upstream at the second write after the
client has gone. Which lines were separated by a blank one it does not know: it puts one after each.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import requests
from flask import Flask, Response, request, stream_with_context

from bench.work import PATH

if TYPE_CHECKING:
    from collections.abc import Iterator

URL = os.environ["BENCH_UPSTREAM"] + PATH

app = Flask(__name__)


@app.post(PATH)
def relay() -> Response:
    headers = {"Authorization": request.headers["Authorization"]}
    upstream = requests.post(URL, json=request.get_json(), headers=headers, stream=True, timeout=(5, 600))

    def events() -> Iterator[bytes]:
        for line in upstream.iter_lines():
            if line:
                yield line + b"\n\n"

    return Response(stream_with_context(events()), upstream.status_code, mimetype="text/event-stream")
