"""A server of shards on loopback that fails as real ones do: now and then, for one request.

In: a folder. Out: its files over http, with ranges; while `faulty`, some requests get a 503, half of their
bytes, or nothing for seconds.
"""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SHARES = {"503": 0.004, "cut": 0.002, "stall": 0.0005}
"""Of the requests. Each costs a pause of half a second or a stall, and a start makes hundreds."""

STALL = (1.0, 6.0)
"""Seconds without an answer: some are longer than the client's patience for one attempt."""


class FlakyServer:
    """Serves a folder; use it in a `with` block.

    Attributes:
        faulty: whether it fails at all.
        requests: how many it had while it was faulty.
        failed: how many of those it failed, by kind.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.faulty = folder, False
        self.requests, self.failed = 0, Counter[str]()
        self.random, self.closing = random.Random(seed), threading.Event()
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"ours": self}))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def draw(self) -> str | None:
        """How the next request fails, None for not at all."""
        with self._lock:
            if not self.faulty:
                return None
            self.requests += 1
            kinds, shares = [*SHARES, None], [*SHARES.values(), 1 - sum(SHARES.values())]
            kind = self.random.choices(kinds, shares)[0]
            self.failed.update([kind] if kind else [])
            return kind

    def __enter__(self) -> FlakyServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is no error of the server's."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ours: FlakyServer

    def do_GET(self) -> None:
        path, fault = self.ours.folder / self.path.lstrip("/"), self.ours.draw()
        if fault == "stall":
            self.ours.closing.wait(self.ours.random.uniform(*STALL))
            self.close_connection = True
        elif fault == "503" or not path.is_file():
            self._head(503 if fault else 404, 0)
        else:
            self._file(path, cut=fault == "cut")

    def _file(self, path: Path, cut: bool) -> None:
        content, size = path.read_bytes(), path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2]), size - 1)
            content = content[first : last + 1]
            self._head(206, len(content), f"bytes {first}-{last}/{size}")
        else:
            self._head(200, size)
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def _head(self, status: int, length: int, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass
