"""What the page of a search asks for, as bytes: the page itself, pictures, heat maps. No sockets here.

In: a path and the parameters behind it. Out: a `Reply`. Pictures have numbers, those of the index: no name of
a file comes in, so that nothing but what was indexed can be asked for.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .. import heat
from ..data.images import extension
from ..towers.image import has_patches
from ..types import Box, UserError
from . import page
from .index import picture
from .query import Searcher

SIDE = 640  # pixels of a picture's longer side on the page
LONGEST = 20_000  # characters of a query
_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}


class Reply(NamedTuple):
    status: int
    kind: str  # media type
    body: bytes


class Prepared(NamedTuple):
    """A picture whose patches wait for sentences."""

    height: int  # pixels, on the page
    width: int
    shown: Box  # the part that the model sees
    patches_YXE: Tensor


class Gallery:
    """Answers what a browser asks. Any number of threads may ask; the model works for one at a time."""

    def __init__(self, searcher: Searcher, title: str, count: int) -> None:
        self.searcher, self.title, self.count = searcher, title, count
        self.points = has_patches(searcher.tower.backbone.visual)
        self._model = threading.Lock()
        self._prepared = lru_cache(maxsize=32)(self._prepare)

    def reply(self, path: str, parameters: Mapping[str, str]) -> Reply:
        """What lies at a path; a mistake of the user's is a page that says so."""
        try:
            if path == "/":
                return self._page(parameters.get("q", "").strip())
            asked = re.fullmatch(r"/(small|whole|heat)/([0-9]{1,9})", path)
            if asked is None or int(asked[2]) >= len(self.searcher.index.files):
                return Reply(404, "text/plain", b"there is nothing here")
            return self._picture(asked[1], int(asked[2]), parameters.get("sentence", ""))
        except UserError as error:
            return Reply(400, "text/plain; charset=utf-8", f"{error}".encode(errors="replace"))
        except OSError:
            return Reply(404, "text/plain", b"this picture is gone: start the search anew")

    def _page(self, query: str) -> Reply:
        if len(query) > LONGEST:
            raise UserError(f"a query of {len(query):,} characters is too long: at most {LONGEST:,}")
        index = self.searcher.index
        if not query:
            html = page.start(self.title, index, self.count)
        else:
            with self._model:
                answer = self.searcher.answer(query, self.count)
            html = page.results(self.title, index, answer, self.points)
        return Reply(200, "text/html; charset=utf-8", html.encode(errors="replace"))

    @torch.no_grad()
    def _picture(self, what: str, number: int, sentence: str) -> Reply:
        path = self.searcher.index.path(number)
        if what == "whole":
            data = path.read_bytes()
            return Reply(200, _TYPES[extension(data)], data)
        if what == "small":
            return Reply(200, "image/jpeg", small(picture(path)))
        if not sentence or len(sentence) > LONGEST:
            raise UserError("a heat map needs a sentence")
        with self._model:
            found = self._prepared(number)
            text_1E = self.searcher.tower.encode_captions([sentence])
        map_YX = (found.patches_YXE @ text_1E[0]).cpu()
        return Reply(200, "image/png", heat.overlay(map_YX, found.height, found.width, found.shown))

    def _prepare(self, number: int) -> Prepared:
        image_CHW = picture(self.searcher.index.path(number))
        height, width = image_CHW.shape[1:]
        _, patches_YXE = heat.patches(self.searcher.tower, self.searcher.transform(image_CHW))
        shown = self.searcher.transform.window(height, width)
        return Prepared(*_on_page(height, width), shown, patches_YXE)


def small(image_CHW: Tensor) -> bytes:
    """The picture as the page shows it, a JPEG; as models do, it ignores EXIF orientation."""
    height, width = _on_page(*image_CHW.shape[1:])
    resized = Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).resize((width, height))
    written = io.BytesIO()
    resized.save(written, "JPEG", quality=85)
    return written.getvalue()


def _on_page(height: int, width: int) -> tuple[int, int]:
    share = min(1.0, SIDE / max(height, width))
    return max(1, round(share * height)), max(1, round(share * width))
