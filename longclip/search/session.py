"""What `longclip search` does once a folder is open: answer one query, ask for more, or serve the page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlencode

from rich.console import Console
from rich.progress import Progress

from ..types import UserError
from .gallery import Gallery
from .query import Searcher
from .serving import Server, is_loopback
from .terminal import facts, table


@contextmanager
def progress() -> Iterator[Callable[[int, int], object]]:
    """A bar on a terminal while pictures are embedded."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("embedding")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def begin(searcher: Searcher) -> None:
    """Say what is searched."""
    print("\n".join(facts(searcher.index)), file=sys.stderr)


def answer(searcher: Searcher, query: str, count: int) -> None:
    """Print the pictures that fit."""
    Console(width=None if sys.stdout.isatty() else 110).print(table(searcher.answer(query, count)))


def ask(searcher: Searcher, count: int) -> None:
    """Answer a query a line, until there are no more."""
    prompt = "\ndescribe a picture (Ctrl-D ends): " if sys.stdin.isatty() else ""
    while True:
        try:
            answer(searcher, input(prompt), count)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except (EOFError, KeyboardInterrupt):
            return


def serve(searcher: Searcher, query: str | None, count: int, host: str, port: int) -> None:
    """Serve the page until Ctrl-C; its address begins with the answer to a query, where there is one."""
    gallery = Gallery(searcher, f"Search {searcher.index.root.resolve().name}", count)
    with Server(gallery, host, port) as server:
        question = f"?{urlencode({'q': query})}" if query else ""
        print(f"{server.url}{question} (Ctrl-C ends it)", flush=True)
        if not is_loopback(host):
            print("everybody who reaches this machine can see these pictures", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
