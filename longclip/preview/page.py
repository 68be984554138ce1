"""The preview as one HTML file: no script, no font, no address in it; every text of the data is escaped.

In: `look.Shown` samples and `look.Counts`. Out: HTML. `page.html` beside this file holds the layout and the
style; its policy forbids scripts and the network, so that a mistake here could not fetch or run anything.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..pages import filled
from ..types import Box, Text
from .look import Counts, Picture, Shown, Slot, Told
from .recipe import Recipe
from .summary import CLASSES, LIMITS, groups, histogram, sources

_HUES = ("#0072b2", "#d55e00", "#007a5a", "#a83279", "#7a5c00", "#3f3fbf", "#8a2f2f", "#2f6b8a")
_TEMPLATE = Path(__file__).with_name("page.html")
_SMALL = 128  # pixels; smaller pictures are shown with their pixels


class Spelling(NamedTuple):
    """How token ids read, and how many of them the model takes."""

    decode: Callable[[Sequence[int]], str]  # without start and end token
    extra: int  # start and end tokens
    pad_id: int
    context_length: int


def render(
    samples: Sequence[Shown], counts: Counts, recipe: Recipe, facts: Mapping[str, str], spelling: Spelling
) -> str:
    """The whole page. `facts` are lines for its head, plain text."""
    highest = max((number for shown in samples for number in _numbers(shown)), default=0)
    return filled(
        _TEMPLATE,
        title="What training shows",
        subtitle=f"{len(samples)} images, decoded and augmented, with the texts that the recipe chose",
        facts="".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()),
        hues="\n".join(_hue(number) for number in range(1, highest + 1)),
        histogram=histogram([length for lengths in counts.sources.values() for length in lengths]),
        sources=sources(counts),
        groups=groups(counts, recipe),
        legend=_legend(recipe),
        samples="\n".join(_sample(shown, recipe.transform.size, spelling) for shown in samples),
    )


def pieces(ids: Sequence[int], start: int, spelling: Spelling) -> list[tuple[int, bool, Sequence[int]]]:
    """Ids from `start` on, cut at the limits: (limits passed, whether the model takes them, ids).

    A text of n tokens has n - `extra` ids, since start and end token take their room.
    """
    rooms = [limit - spelling.extra for limit in LIMITS]
    taken = spelling.context_length - spelling.extra
    edges = sorted({start, len(ids), *(edge for edge in (*rooms, taken) if start < edge < len(ids))})
    return [(sum(a >= room for room in rooms), a < taken, ids[a:b]) for a, b in pairwise(edges)]


def pads(ids: Sequence[int], pad_id: int) -> int:
    """How many pad tokens a text begins with (a recipe may shift it); a single one may be a "!"."""
    count = next((at for at, token in enumerate(ids) if token != pad_id), len(ids))
    return count if count > 1 else 0


def _numbers(shown: Shown) -> Iterable[int]:
    return (number for picture in shown.pictures for number in picture.boxes)


def _hue(number: int) -> str:
    """A colour for every box of this number, and the box shown while its text is pointed at."""
    at = f'[data-box="{number}"]'
    pointed = f".sample:has(.linked{at}:is(:hover, :focus))"
    return (
        f"{at} {{ --hue: {_HUES[(number - 1) % len(_HUES)]}; }} "
        f"{pointed} .box.shown {{ opacity: .12; }} {pointed} .box{at}{at} {{ opacity: 1; }}"
    )


def _legend(recipe: Recipe) -> str:
    parts = [
        f"<span>up to {LIMITS[0]} tokens</span>",
        f'<span><mark class="late">{LIMITS[0] + 1} to {LIMITS[1]}: dotted line</mark></span>',
        f'<span><mark class="far">behind {LIMITS[1]}: double line</mark></span>',
        f'<span><span class="unseen">struck out</span>: cut at {recipe.context_length}</span>',
    ]
    return "".join(parts)


def _sample(shown: Shown, size: int, spelling: Spelling) -> str:
    if shown.damage:
        why = f'<p class="damage">{escape(shown.damage)}</p>'
        return f'<article class="card sample"><h3>{escape(shown.key)}</h3>{why}</article>'
    visible: set[int | None] = {slot.box for slot in shown.slots if slot.box}
    pictures = "".join(_picture(picture, visible, size) for picture in shown.pictures)
    slots = "".join(_slot(slot, spelling) for slot in shown.slots)
    told = "".join(_told(caption) for caption in shown.captions)
    stored = f"{len(shown.captions)} stored caption{'s' if len(shown.captions) > 1 else ''}"
    return (
        f'<article class="card sample">'
        f"<header><h3>{escape(shown.key)}</h3><span>{escape(shown.shard)}</span></header>"
        f'<div class="sides"><div class="pictures">{pictures}</div><ul class="slots">{slots}</ul></div>'
        f"<details><summary>{stored}</summary>{told}</details></article>"
    )


def _picture(picture: Picture, visible: set[int | None], size: int) -> str:
    data = base64.b64encode(picture.png).decode()
    boxes = "".join(_box(number, box, number in visible) for number, box in picture.boxes.items())
    lost = len(visible - set(picture.boxes))
    note = f"; {lost} box{'es' if lost > 1 else ''} outside the crop" if lost else ""
    title = escape(picture.title)
    return (
        f'<figure><div class="frame{" small" if size <= _SMALL else ""}">'
        f'<img src="data:image/png;base64,{data}" width="{size}" height="{size}" alt="{title}">{boxes}</div>'
        f"<figcaption>{title}, {size} px{note}</figcaption></figure>"
    )


def _box(number: int, box: Box, shown: bool) -> str:
    left, top, right, bottom = (100 * edge for edge in box)
    place = f"left:{left:.2f}%;top:{top:.2f}%;width:{right - left:.2f}%;height:{bottom - top:.2f}%"
    kind = "box shown" if shown else "box"
    return f'<div class="{kind}" data-box="{number}" style="{place}"><i>{number}</i></div>'


def _slot(slot: Slot, spelling: Spelling) -> str:
    if slot.text is None:
        return f'<li><div class="head"><b>{escape(slot.group)}</b><span class="chip">masked</span></div></li>'
    tokens = len(slot.text.ids) + spelling.extra
    cut = tokens - spelling.context_length
    chips = f'<span class="chip">{tokens} tokens</span>'
    chips += f'<span class="chip cut">{cut} cut</span>' if cut > 0 else ""
    return (
        f"<li{_link(slot.box)}>"
        f'<div class="head">{_number(slot.box)}<b>{escape(slot.group)}</b>{chips}</div>'
        f"<p>{_marked(slot.text, spelling)}</p></li>"
    )


def _marked(text: Text, spelling: Spelling) -> str:
    """The text as the model's tokens spell it, marked where it passes a limit."""
    start, before = pads(text.ids, spelling.pad_id), 0
    spelt = [f'<span class="chip">{start} x padding</span> '] if start else []
    for passed, taken, ids in pieces(text.ids, start, spelling):
        shown = escape(spelling.decode(ids))
        shown = shown if taken else f'<span class="unseen">{shown}</span>'
        if passed > before:
            spelt.append(f'<span class="limit-mark">{LIMITS[passed - 1]}</span>')
        spelt.append(f'<mark class="{CLASSES[passed]}">{shown}</mark>' if passed else shown)
        before = passed
    return "".join(spelt)


def _told(caption: Told) -> str:
    sentences = "".join(
        f"<li{_link(box)}>{_number(box)} {escape(sentence)}</li>" for sentence, box in caption.sentences
    )
    return f"<h4>{escape(caption.source)}</h4><ol>{sentences}</ol>"


def _link(box: int | None) -> str:
    """Attributes that tie a text to its box; tabindex, so that fingers and keys can point at it, too."""
    return f' class="linked" tabindex="0" data-box="{box}"' if box else ""


def _number(box: int | None) -> str:
    return f'<span class="number">{box}</span>' if box else ""
