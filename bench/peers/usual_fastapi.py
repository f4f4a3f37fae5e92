"""The relay that most FastAPI apps have: httpx and sse-starlette. A peer, not an example.

With one client for all requests and without its limit of 100 connections: many have one for each request, which costs
several times as much. sse-starlette writes events anew, with other line ends, so the bytes are not the upstream's.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
from fastapi import FastAPI, Request
from sse_starlette.sse import EventSourceResponse

from bench.work import PATH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

URL = os.environ["BENCH_UPSTREAM"] + PATH


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=512)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=True) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.post(PATH)
async def relay(request: Request) -> Any:
    body = await request.json()
    headers = {"Authorization": request.headers["Authorization"]}

    async def events() -> AsyncIterator[dict[str, str]]:
        async with app.state.client.stream("POST", URL, json=body, headers=headers) as upstream:
            async for line in upstream.aiter_lines():
                if line.startswith("data: "):
                    yield {"data": line.removeprefix("data: ")}

    return EventSourceResponse(events())
