"""Examples for people: which queries a model failed, what it found instead, and where its sentences point.

In: retrieval in full (`evaluate.Ranked`) and the tower. Out: a `Gallery` for every benchmark that
retrieves, small enough for a page or a logger. Every process may make them: they depend on nothing else.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from .data.images import decode
from .data.module import transform_of
from .evaluate import Findings, Ranked
from .heat import check, heat
from .sentences import split
from .towers.clip import DualTower
from .types import UserError

SIDE = 320  # pixels of the longer side, at most
SENTENCES = 16  # of one image, at most


class Failure(NamedTuple):
    """A query whose right answer did not come first, and the wrong one that did."""

    rank: int  # of the best right answer, 2 or more
    key: str  # of the right pair's image
    picture: bytes  # JPEG or PNG; empty where the image cannot be read
    text: str
    found_key: str
    found_picture: bytes | None  # where a text asked for its image
    found_text: str | None  # where an image asked for a text


class Pointed(NamedTuple):
    """An image as the model sees it, its sentences, and where each of them fits."""

    key: str
    rank: int  # of the image among all, asked for by its text
    picture: bytes
    sentences: Sequence[str]
    similarity: Sequence[float]  # cosine of the whole image and each sentence
    heat_SYX: Tensor


class Way(NamedTuple):
    """One direction of retrieval. The failures go from the nearest miss to the worst."""

    queries: int
    items: int  # that each query chooses from
    right: int  # queries that found a right answer first
    failures: list[Failure]


class Gallery(NamedTuple):
    """What one view of a benchmark has to show."""

    benchmark: str
    view: str
    t2i: Way
    i2t: Way
    pointed: list[Pointed]
    unpointed: str = ""  # why there are no heat maps


def galleries(tower: DualTower, findings: Mapping[str, Findings], count: int) -> list[Gallery]:
    """One for each benchmark that retrieves, of the view that it names first.

    Args:
        count: failures each way, half of them near misses and half the worst; as many images with heat maps.
    """
    firsts = {name: next(iter(found.ranked.items())) for name, found in findings.items() if found.ranked}
    with _evaluating(tower):
        return [_gallery(tower, name, *first, count) for name, first in firsts.items()]


def _gallery(tower: DualTower, benchmark: str, view: str, ranked: Ranked, count: int) -> Gallery:
    t2i = [_asked_by_text(ranked, m) for m in chosen(ranked.t2i_ranks, count)]
    i2t = [_asked_by_image(ranked, q) for q in chosen(ranked.i2t_ranks, count)]
    try:
        check(tower)
        tried = [_pointed(tower, ranked, m) for m in _texts_to_point(ranked, count)]
        pointed, why = [one for one in tried if one], ""
    except UserError as error:
        pointed, why = [], str(error)
    return Gallery(
        benchmark,
        view,
        _way(ranked.t2i_ranks, len(ranked.images), t2i),
        _way(ranked.i2t_ranks, len(ranked.texts), i2t),
        pointed,
        why,
    )


def _way(ranks: Sequence[int], items: int, failures: list[Failure]) -> Way:
    return Way(len(ranks), items, sum(rank == 1 for rank in ranks), failures)


def chosen(ranks: Sequence[int], count: int) -> list[int]:
    """Which queries to show: of those that failed, the nearest misses and the worst, by rank.

    >>> chosen([1, 5, 2, 9, 1, 3], 2)
    [2, 3]
    """
    failed = sorted((at for at, rank in enumerate(ranks) if rank > 1), key=lambda at: ranks[at])
    near = (count + 1) // 2
    return failed if len(failed) <= count else failed[:near] + failed[len(failed) - count + near :]


def _asked_by_text(ranked: Ranked, m: int) -> Failure:
    right, found = ranked.owners[m], ranked.t2i_first[m]
    pictures = [_thumbnail(ranked, n) for n in (right, found)]
    key, found_key = ranked.images[right], ranked.images[found]
    return Failure(ranked.t2i_ranks[m], key, pictures[0], _text(ranked, m), found_key, pictures[1], None)


def _asked_by_image(ranked: Ranked, q: int) -> Failure:
    image, found = ranked.asked[q], ranked.i2t_first[q]
    own = _text(ranked, list(ranked.owners).index(image))
    key, found_key = ranked.images[image], ranked.images[ranked.owners[found]]
    picture = _thumbnail(ranked, image)
    return Failure(ranked.i2t_ranks[q], key, picture, own, found_key, None, _text(ranked, found))


def _text(ranked: Ranked, m: int) -> str:
    """As the model was shown it, without the spaces that tokens bring: "a dog , wet ." """
    return re.sub(r" (?=[.,;:!?)])", "", ranked.texts[m])


def _texts_to_point(ranked: Ranked, count: int) -> list[int]:
    """The worst failures, and as many texts that found their image, evenly spread."""
    found = [m for m, rank in enumerate(ranked.t2i_ranks) if rank == 1]
    worst = chosen(ranked.t2i_ranks, count)[::-1][: count // 2]
    wanted = count - len(worst)
    return worst + [found[len(found) * part // wanted] for part in range(min(wanted, len(found)))]


def _pointed(tower: DualTower, ranked: Ranked, m: int) -> Pointed | None:
    """None where the image cannot be read."""
    image, text = ranked.owners[m], _text(ranked, m)
    image_CHW = _decoded(ranked, image)
    if image_CHW is None:
        return None
    shown_CHW = transform_of(tower.preprocess_cfg)(image_CHW)
    sentences = [text[a:b] for a, b in split(text)][:SENTENCES]
    similarity_S, heat_SYX = heat(tower, shown_CHW, sentences)
    found = (_encoded(_pixels(shown_CHW)), sentences, similarity_S.tolist(), heat_SYX)
    return Pointed(ranked.images[image], ranked.t2i_ranks[m], *found)


def _thumbnail(ranked: Ranked, n: int) -> bytes:
    """A small copy; nothing where the image cannot be read."""
    image_CHW = _decoded(ranked, n)
    if image_CHW is None:
        return b""
    small = _pixels(image_CHW)
    small.thumbnail((SIDE, SIDE))
    return _encoded(small)


def _decoded(ranked: Ranked, n: int) -> Tensor | None:
    """None where the image cannot be read: that is for judging to say."""
    try:
        return decode(ranked.picture(n))
    except UserError:
        return None


def _pixels(image_CHW: Tensor) -> Image.Image:
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def _encoded(picture: Image.Image) -> bytes:
    """PNG for pictures of few pixels, which JPEG would blur."""
    written = io.BytesIO()
    if max(picture.size) <= SIDE // 2:
        picture.save(written, "PNG")
    else:
        picture.save(written, "JPEG", quality=80)
    return written.getvalue()


@contextmanager
def _evaluating(tower: DualTower) -> Iterator[None]:
    """The tower's mode is restored."""
    was_training = tower.training
    tower.eval()
    try:
        yield
    finally:
        tower.train(was_training)
