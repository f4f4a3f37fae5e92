"""As little as an asyncio relay can do: aiohttp on both sides, bytes passed on as they come. A peer, not an example.

    python -m bench.peers.lean_aiohttp PORT

No time limits, no heartbeat, no limits, no metrics; uvloop if it is installed.
"""

from __future__ import annotations

import os
import ssl
import sys
from typing import TYPE_CHECKING

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

from bench.work import PATH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

URL = os.environ["BENCH_UPSTREAM"] + PATH
SESSION = web.AppKey("session", ClientSession)


async def relay(request: web.Request) -> web.StreamResponse:
    headers = {name: request.headers[name] for name in ("Authorization", "Content-Type")}
    body = await request.read()
    async with request.app[SESSION].post(URL, data=body, headers=headers) as upstream:
        response = web.StreamResponse(status=upstream.status)
        response.content_type = upstream.content_type
        await response.prepare(request)
        async for data in upstream.content.iter_any():
            await response.write(data)
        return response


async def session(app: web.Application) -> AsyncIterator[None]:
    # Reads SSL_CERT_FILE; made once, for it takes 14 ms.
    connector = TCPConnector(limit=0, ssl=ssl.create_default_context())
    async with ClientSession(connector=connector, timeout=ClientTimeout(total=None)) as app[SESSION]:
        yield


def main() -> None:
    try:
        import uvloop
    except ModuleNotFoundError:
        pass
    else:
        uvloop.install()
    app = web.Application()
    app.router.add_post(PATH, relay)
    app.cleanup_ctx.append(session)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, backlog=4096, print=None)


if __name__ == "__main__":
    main()
