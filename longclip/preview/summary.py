"""The numbers of a preview: a histogram of caption lengths and two tables, as HTML.

In: `look.Counts`. Out: HTML with every text of the data escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from statistics import median

from .look import Counts
from .recipe import Recipe

LIMITS = (77, 248)  # tokens that CLIP and Long-CLIP see, start and end token included
CLASSES = ("", "late", "far")  # up to, behind the first, and behind the second limit


def shares(lengths: Sequence[int], limit: int) -> float:
    """Share of texts longer than a limit, in percent."""
    return 100 * sum(length > limit for length in lengths) / max(1, len(lengths))


def histogram(lengths: Sequence[int], bins: int = 48) -> str:
    """Bars of caption lengths as an inline SVG, with HTML labels that stay readable when it shrinks."""
    longest = max([*lengths, LIMITS[1] + 12])
    width = -(-longest // bins)
    heights = [0] * (longest // width + 1)
    for length in lengths:
        heights[length // width] += 1
    total, top = len(heights) * width, max(1, *heights)
    bars = "".join(_bar(at * width, width, 100 * height / top) for at, height in enumerate(heights) if height)
    lines = "".join(f'<line x1="{limit}" x2="{limit}" y1="0" y2="100"/>' for limit in LIMITS)
    labels = "".join(_label(limit, total, shares(lengths, limit)) for limit in LIMITS)
    label = f"Histogram of {len(lengths)} caption lengths in tokens, the longest {max(lengths, default=0)}"
    return (
        f'<p class="soft">Tokens of {len(lengths):,} captions, start and end token included</p>'
        f'<div class="chart"><svg viewBox="0 0 {total} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{bars}{lines}</svg>{labels}'
        f'<span class="x first" style="left:0">0</span>'
        f'<span class="x last" style="left:100%">{total} tokens</span></div>'
    )


def _bar(start: int, width: int, height: float) -> str:
    kind = CLASSES[sum(start >= limit for limit in LIMITS)]
    place = f'x="{start + 0.1 * width:.2f}" width="{0.8 * width:.2f}"'
    return f'<rect class="{kind}" {place} y="{100 - height:.2f}" height="{height:.2f}"/>'


def _label(limit: int, total: int, share: float) -> str:
    at = limit / total
    side = "start" if at < 0.3 else "end" if at > 0.6 else ""  # so that it stays inside a narrow chart
    return f'<span class="limit {side}" style="left:{100 * at:.2f}%">{limit}: {share:.1f} % longer</span>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells carry their column's name: on a phone, where columns do not fit, it stands before them."""
    names = [escape(name) for name in head]
    body = "".join(
        "<tr>"
        + "".join(f'<td data-name="{n}">{escape(c)}</td>' for n, c in zip(names, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>{body}</table>"


def sources(counts: Counts) -> str:
    head = ["source", "captions", "sentences each", "tokens (median)", "longest"]
    head += [f"longer than {limit}" for limit in LIMITS]
    rows = [
        [
            source,
            f"{len(lengths):,}",
            f"{sum(counts.sentences[source]) / len(lengths):.1f}",
            f"{median(lengths):.0f}",
            f"{max(lengths)}",
            *(f"{shares(lengths, limit):.1f} %" for limit in LIMITS),
        ]
        for source, lengths in sorted(counts.sources.items())
    ]
    return _table(head, rows)


def groups(counts: Counts, recipe: Recipe) -> str:
    head = ["group", "policy", "texts per image", "tokens (median)", f"cut at {recipe.context_length}"]
    seen = max(1, counts.images - counts.damaged)
    rows = []
    for group, policy in recipe.policies.items():
        lengths = counts.groups.get(group, [])
        middle = f"{median(lengths):.0f}" if lengths else "no text"
        cut = f"{shares(lengths, recipe.context_length):.1f} %"
        rows.append([group, type(policy).__name__, f"{len(lengths) / seen:.1f}", middle, cut])
    return _table(head, rows)
