"""A local web server for a `Gallery`: reads only, no scripts, nothing from elsewhere.

On a loopback address it answers requests to that address alone, so that no page elsewhere can reach the
pictures through a host name of its own (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from ..types import UserError
from .gallery import Gallery, Reply

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """Serves from `serve_forever` on; `url` is where. Raises UserError where the address is taken."""

    daemon_threads = True

    def __init__(self, gallery: Gallery, host: str, port: int) -> None:
        try:
            super().__init__((host, port), partial(Handler, gallery))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"the page cannot be served at {host}:{port} ({error}): choose another --port, or 0 for any"
            ) from error
        self.names = {host, "localhost", "127.0.0.1"} if is_loopback(host) else None
        self.url = f"http://{host}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that no longer waits for a picture is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds, for a browser that opens a connection and says nothing

    def __init__(self, gallery: Gallery, *args: Any) -> None:
        self.gallery = gallery
        super().__init__(*args)

    def do_GET(self) -> None:
        names = self.server.names  # type: ignore[attr-defined]
        if names is not None and _parts(f"//{self.headers.get('Host')}").hostname not in names:
            self._send(Reply(403, "text/plain", b"this address is not served here"))
            return
        url = _parts(self.path)
        parameters = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self._send(self.gallery.reply(url.path, parameters))

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: queries are nobody's business."""

    def version_string(self) -> str:
        return "longclip"


def _parts(address: str) -> SplitResult:
    """Of what is no address, such as "//[", empty ones."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
