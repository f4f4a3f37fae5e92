"""A shop with pages: `/` is an empty one whose import map finds React.

`/static/` has the JavaScript client, `/built/` what a test has built, `/v1` relays with the environment's settings.
"""

import os
from pathlib import Path

from flask import Flask, Response, send_from_directory

from relay import Relay

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>A page of the shop</title>
<link rel="icon" href="data:,">
<script type="importmap">
{"imports": {"react": "/built/react.js", "react-dom/client": "/built/react.js"}}
</script>
</head>
<body><main id="root"></main></body>
</html>
"""

app = Flask(__name__, static_folder=str(Path(__file__).parents[2] / "relay/static"))
app.config.update({name: value for name, value in os.environ.items() if name.startswith("RELAY_")})


@app.get("/")
def page() -> Response:
    return Response(PAGE, mimetype="text/html")


@app.get("/built/<path:name>")
def built(name: str) -> Response:
    return send_from_directory(os.environ["BUILT"], name)


Relay(app, url_prefix="/v1")
