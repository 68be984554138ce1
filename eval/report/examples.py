"""A gallery as HTML: what the model failed at, and where its sentences point.

In: `longclip.gallery.Gallery`. Out: HTML in which every text is escaped, and style rules that hold pictures.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape

from longclip.data.images import extension
from longclip.gallery import SENTENCES, Failure, Gallery, Pointed, Way
from longclip.heat import overlay

_MIME = {"jpg": "jpeg", "png": "png"}
_MAPS = (
    "How well each patch of the image fits a sentence, from dark to bright; the number is the cosine of the "
    "sentence and the whole image. Point at a sentence, or tap it, to see its map large."
)
_HEAT = 32  # pixels of a map; the browser smooths it over the picture


def gallery(shown: Gallery, number: int) -> str:
    """One benchmark's failures and heat maps; `number` tells its pictures from those of other galleries."""
    failures = _way(shown.t2i, "Texts that asked for their image", "found another image first")
    failures += _way(shown.i2t, "Images that asked for their text", "found another text first")
    maps = "".join(_pointed(one, f"p{number}-{at}") for at, one in enumerate(shown.pointed))
    if shown.unpointed:
        maps = f'<p class="soft">No heat maps: {escape(shown.unpointed)}.</p>'
    opened = "" if number else " open"
    return (
        f"<details{opened}><summary><h2>{escape(shown.benchmark)}: failures and heat maps</h2></summary>"
        f'<p class="soft">View {escape(shown.view)}. Nearest misses first, then the worst. Marked are the '
        f"words that only one of two texts has.</p>{failures}"
        f'<h3>Where sentences point</h3><p class="soft">{_MAPS}</p>{maps}</details>'
    )


def rules(galleries: Sequence[Gallery]) -> str:
    """Style rules: each picture once, and which map is large while its sentence is pointed at."""
    pictures = [
        f".p{number}-{at} {{ background-image: url('{_data(one.picture)}'); }}"
        for number, shown in enumerate(galleries)
        for at, one in enumerate(shown.pointed)
    ]
    pointing = [
        f".pointed:has(.linked.m{at}:is(:hover, :focus)) .large .m{at} {{ opacity: 1; }}"
        for at in range(SENTENCES)
    ]
    return "\n".join([*pictures, *pointing])


def _way(way: Way, asked: str, failed: str) -> str:
    cards = "".join(_failure(failure, way.items) for failure in way.failures)
    wrong = f"{way.queries - way.right:,} of {way.queries:,}"
    return f'<h3>{asked}: {wrong} {failed}</h3><div class="failures">{cards}</div>'


def _failure(failure: Failure, items: int) -> str:
    right = _figure(failure.picture, "the right image")
    if failure.found_picture is not None:
        found = _figure(failure.found_picture, f"came first: {failure.found_key}")
        body = f'<p>{escape(failure.text)}</p><div class="pair">{right}{found}</div>'
    else:
        own, theirs = _told_apart(failure.text, failure.found_text or "")
        texts = [
            f"<div><h4>the right text</h4><p>{own}</p></div>",
            f"<div><h4>came first</h4><p>{theirs}</p></div>",
        ]
        body = f'<div class="texts">{right}{"".join(texts)}</div>'
    return (
        f'<article class="card">{_head(f"rank {failure.rank:,} of {items:,}", failure.key)}{body}</article>'
    )


def _head(chip: str, key: str) -> str:
    return f'<header><span class="chip">{chip}</span><span class="soft">{escape(key)}</span></header>'


def _told_apart(own: str, theirs: str) -> tuple[str, str]:
    """Two texts with the words marked that the other one does not have."""
    words = [set(re.findall(r"\w+", text.lower())) for text in (own, theirs)]
    return _marked(own, words[1]), _marked(theirs, words[0])


def _marked(text: str, known: set[str]) -> str:
    parts = re.split(r"(\w+)", text)  # words at odd places
    return "".join(
        f"<mark>{escape(part)}</mark>" if at % 2 and part.lower() not in known else escape(part)
        for at, part in enumerate(parts)
    )


def _figure(picture: bytes, caption: str) -> str:
    shown = f'<img src="{_data(picture)}" alt="{escape(caption)}">' if picture else "(cannot be read)"
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def _pointed(one: Pointed, name: str) -> str:
    maps = [_data(overlay(heat_YX, _HEAT, _HEAT)) for heat_YX in one.heat_SYX]
    large = "".join(f'<img class="m{at}" src="{data}" alt="">' for at, data in enumerate(maps))
    told = zip(one.sentences, one.similarity, maps, strict=True)
    items = "".join(
        f'<li class="linked m{at}" tabindex="0"><span class="tile {name}"><img src="{data}" alt=""></span>'
        f'<span>{escape(sentence)} <span class="chip">{similarity:.2f}</span></span></li>'
        for at, (sentence, similarity, data) in enumerate(told)
    )
    head = _head("found first" if one.rank == 1 else f"rank {one.rank:,}", one.key)
    return (
        f'<article class="card pointed"><div class="large {name}" role="img" aria-label="{escape(one.key)}">'
        f"{large}</div><div>{head}<ul>{items}</ul></div></article>"
    )


def _data(picture: bytes) -> str:
    return f"data:image/{_MIME[extension(picture)]};base64,{base64.b64encode(picture).decode()}"
