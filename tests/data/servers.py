"""A folder over http on loopback, with the faults that real servers have."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server:
    """Serves a folder with ranges; use it in a `with` block.

    Attributes:
        asked: (method, file name, first byte or None) of every request, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []
        self._answers: dict[str, Iterator[object]] = {}
        self._lock, self.closing = threading.Lock(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.ours = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def answer(self, ending: str, answers: Iterable[object]) -> None:
        """What requests for files of this ending get instead of the file, one after the other.

        A status (404, 503, ...), "cut" (half of the bytes, then the connection closes), "slow" (nothing until
        the server closes), "whole" (the file from its start, whatever range was asked for).
        """
        self._answers[ending] = iter(answers)

    def take(self, name: str) -> object:
        with self._lock:
            for ending, answers in self._answers.items():
                if name.endswith(ending):
                    return next(answers, None)
        return None

    def gets(self, ending: str = "") -> list[int | None]:
        """The first byte asked for, of every GET of such files."""
        return [first for method, name, first in self.asked if method == "GET" and name.endswith(ending)]

    def __enter__(self) -> Server:
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def _serve(self, body: bool) -> None:
        server: Server = self.server.ours
        name = self.path.partition("?")[0].lstrip("/")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        server.asked.append((self.command, name, int(wanted[1]) if wanted else None))
        answer, path = server.take(name), server.folder / name
        if answer is None and not path.is_file():
            answer = 404
        if answer == "slow":
            server.closing.wait(30)
            self.close_connection = True
            return
        if isinstance(answer, int):
            self.send_response(answer)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(path.read_bytes(), wanted if answer != "whole" else None, answer == "cut", body)

    def _send(self, content: bytes, wanted: re.Match[str] | None, cut: bool, body: bool) -> None:
        size = len(content)
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            time.sleep(0.1)  # what was sent can be read before the end is noticed
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
