"""`longclip search`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def search_command(commands: Any) -> None:
    search = commands.add_parser("search", help="pictures of a folder by long descriptions")
    search.add_argument("folder", type=Path, help="JPEG, PNG and WebP files, however deep")
    search.add_argument("--query", help="a description; without one: a line of standard input each")
    search.add_argument("--model", required=True, help="a run, .ckpt, export, hf-hub: or ARCHITECTURE/TAG")
    search.add_argument("--top", type=_positive, default=12, help="pictures to show; default: 12")
    search.add_argument("--serve", action="store_true", help="a page in the browser, with heat maps")
    search.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    search.add_argument("--port", type=int, default=8600, help="default: 8600; 0: any free one")
    search.add_argument("--cache", type=Path, help="keeps embeddings; default: ~/.cache/longclip/search")
    search.add_argument("--device", help="default: a GPU where there is one")
    search.add_argument(
        "--batch-size", type=_positive, default=32, help="pictures embedded at once; default: 32"
    )
    search.add_argument("--workers", type=_positive, default=2, help="threads that read pictures; default: 2")
    search.set_defaults(run=_search)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _search(options: argparse.Namespace) -> None:
    from ..search import open_folder, session

    with session.progress() as progress:
        searcher = open_folder(
            options.folder,
            options.model,
            progress,
            cache=options.cache,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
        )
    session.begin(searcher)
    if options.serve:
        session.serve(searcher, options.query, options.top, options.host, options.port)
    elif options.query is None:
        session.ask(searcher, options.top)
    else:
        session.answer(searcher, options.query, options.top)
