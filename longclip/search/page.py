"""The page of a search: a text field, the pictures that fit, and what of the query each of them fits.

In: an `Index`, an `Answer`. Out: HTML without scripts; every text is escaped. Heat maps are pictures that a
browser fetches when a sentence is pointed at, tapped or reached by keys.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from urllib.parse import urlencode

from ..pages import filled
from .index import Index
from .query import WINDOW, Answer, Fit, Result
from .terminal import facts, limits

_TEMPLATE = Path(__file__).with_name("page.html")
HOW_TO_READ = (
    "The score is the cosine with the whole query. A bar tells how far a picture stands above the folder's "
    "average for one sentence alone; the bold sentence sets it apart most."
)
HOW_TO_POINT = (
    " Point at a sentence, or tap it, to see where it fits: those parts stay bright. This is relative to the "
    "picture, so it shows where the sentence fits best, not whether it does."
)
NO_PATCHES = " This model's images have no patches to compare with sentences, so there are no heat maps."


def start(title: str, index: Index, count: int) -> str:
    """Before the first query: some of the pictures, spread over the folder."""
    total = len(index.files)
    numbers = [total * part // min(count, total) for part in range(min(count, total))]
    pictures = "".join(
        f'<a href="/whole/{n}" title="{escape(index.files[n].shown)}">'
        f'<img src="/small/{n}" alt="{escape(index.files[n].shown)}" loading="lazy"></a>'
        for n in numbers
    )
    body = f'<p class="soft">{total:,} pictures; some of them:</p><div class="grid">{pictures}</div>'
    return _page(title, "", body, index)


def results(title: str, index: Index, answer: Answer, points: bool) -> str:
    """The best pictures, best first. `points`: whether the model can show where a sentence fits."""
    warn = "warn" if answer.unseen else "soft"
    reading = HOW_TO_READ + (HOW_TO_POINT if points else NO_PATCHES)
    head = f'<p class="{warn}">{escape(limits(answer))}</p><p class="soft">{reading}</p>'
    highest = max(fit.above for result in answer.results for fit in result.fits)
    cards = [
        _card(place, result, answer, max(highest, 1e-6), len(index.files), points)
        for place, result in enumerate(answer.results, 1)
    ]
    rules = [
        f".card:has(li:nth-child({n}):is(:hover, :focus)) .map:nth-of-type({n + 1}) {{ display: block; }}"
        for n in range(1, len(answer.sentences) + 1)
    ]
    return _page(title, answer.text, head + "\n".join(cards), index, "\n".join(rules))


def _page(title: str, query: str, body: str, index: Index, rules: str = "") -> str:
    return filled(
        _TEMPLATE,
        title=escape(title),
        query=escape(query),
        body=body,
        rules=rules,
        facts="".join(f"<p>{escape(line)}</p>" for line in facts(index)),
    )


def _card(place: int, result: Result, answer: Answer, highest: float, total: int, points: bool) -> str:
    rows = zip(answer.sentences, result.fits, strict=True)
    fits = [
        _fit(text, fit, n == result.strongest, highest, total, points) for n, (text, fit) in enumerate(rows)
    ]
    window = ""
    if result.window_place is not None:
        window = f'<p class="soft">By the first {WINDOW} tokens alone: place {result.window_place:,}</p>'
    name = f'<a href="/whole/{result.number}">{escape(result.path)}</a>'
    head = f'<header><h2>{place}</h2>{name}<span class="score">{result.score:.3f}</span></header>'
    return (
        f'<article class="card{" points" if points else ""}">{_frame(result, answer, points)}'
        f'<div class="told">{head}{window}<ol>{"".join(fits)}</ol></div></article>'
    )


def _frame(result: Result, answer: Answer, points: bool) -> str:
    """The picture, and over it a map for every sentence, none of which is fetched before it is shown."""
    maps = [
        f'<img class="map{" best" if n == result.strongest else ""}" loading="lazy" alt="" '
        f'src="/heat/{result.number}?{escape(urlencode({"sentence": text}))}">'
        for n, text in enumerate(answer.sentences)
    ]
    picture = f'<img src="/small/{result.number}" alt="{escape(result.path)}" loading="lazy">'
    shown = "".join(maps) if points else ""
    return f'<div class="frame"{_reachable(points)}>{picture}{shown}</div>'


def _fit(text: str, fit: Fit, best: bool, highest: float, total: int, points: bool) -> str:
    width = 100 * min(1.0, max(0.0, fit.above / highest))
    return (
        f"<li{' class=best' * best}{_reachable(points)}>{escape(text)}"
        f'<div class="fit" title="cosine {fit.similarity:.3f}, {fit.above:+.1f} standard deviations">'
        f'<span class="bar"><i style="width:{width:.0f}%"></i></span>'
        f"place {fit.place:,} of {total:,}</div></li>"
    )


def _reachable(points: bool) -> str:
    """So that fingers and keys can point at it, too."""
    return ' tabindex="0"' if points else ""
