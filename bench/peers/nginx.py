"""nginx as a bare relay: its configuration. What the shipped one does beside relaying, such as logs, is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_CONFIG = """\
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr crit;
{user}
events {{
    worker_connections 16384;
}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;

    upstream bench {{
        server 127.0.0.1:{upstream_port};
        keepalive 512;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass {scheme}://bench;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
{tls}        }}
    }}
}}
"""
_TLS = """\
            proxy_ssl_trusted_certificate {ca};
            proxy_ssl_verify on;
            proxy_ssl_name localhost;
"""


def config(port: int, upstream_port: int, ca: Path | None, *, root: bool) -> str:
    return _CONFIG.format(
        port=port,
        upstream_port=upstream_port,
        scheme="https" if ca else "http",
        tls=_TLS.format(ca=ca) if ca else "",
        # The name of the worker's usual user differs between systems.
        user="user root;" if root else "",
    )
