"""Numbers as rows for people: printed, and as Markdown.

In: flat name -> number, and the same of the model that it started from or is compared with. Retrieval gets
a row for each view, with image to text / text to image in one cell; every other number has its own row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

Numbers = Mapping[str, float]

HEAD = ("R@1", "R@5", "R@10", "median rank", "tokens", "cut")
NOTE = (
    "image to text / text to image, percent; tokens: mean length of the texts, cut: those too long, percent"
)
_METRICS = ("r1", "r5", "r10", "median")
_WAY = re.compile(r"(?:(.*)/)?(i2t|t2i)_\w+")
_LENGTHS = ("tokens", "tokens_max", "truncated")


def table(numbers: Numbers, start: Numbers | None, title: str) -> Table:
    """What a terminal shows: all numbers, and R@1 and the others as they were at the start."""
    shown = Table(title=title, title_justify="left", caption=NOTE)
    shown.add_column("", overflow="fold")
    for name in (*HEAD, *(["R@1 at start"] if start else [])):
        shown.add_column(name, no_wrap=True)
    for view in views(numbers):
        shown.add_row(view, *cells(numbers, view), *([both(start, view, "r1")] if start else []))
    for name in others(numbers):
        before = number(start[name]) if start and name in start else ""
        shown.add_row(name, number(numbers[name]), *[""] * (len(HEAD) - 1), *([before] if start else []))
    return shown


def markdown(numbers: Numbers, labels: Mapping[str, str]) -> str:
    """The same as Markdown tables; `labels` (model, weights, ...) stand in a line above."""
    lines = ["; ".join(f"{name}: {value}" for name, value in labels.items()), ""]
    lines += _rows(["benchmark", *HEAD], [[view, *cells(numbers, view)] for view in views(numbers)])
    lines += ["", f"R@k: {NOTE}.", ""]
    lines += _rows(["number", "value"], [[name, number(numbers[name])] for name in others(numbers)])
    return "\n".join(lines).rstrip() + "\n"


def views(numbers: Numbers) -> list[str]:
    """What has retrieval numbers: `benchmark/view`, in order."""
    found = (_WAY.fullmatch(name) for name in numbers)
    return list(dict.fromkeys(match[1] or "" for match in found if match))


def others(numbers: Numbers) -> list[str]:
    """The names of all numbers that no view's row shows."""
    shown = {f"{view}/{name}" for view in views(numbers) for name in _LENGTHS}
    return [name for name in numbers if name not in shown and not _WAY.fullmatch(name)]


def cells(numbers: Numbers, view: str) -> list[str]:
    """A view's cells below HEAD."""
    tokens, cut = (numbers.get(f"{view}/{name}") for name in ("tokens", "truncated"))
    lengths = ["" if tokens is None else f"{tokens:.0f}", "" if cut is None else f"{cut:.1f}"]
    return [*(both(numbers, view, metric) for metric in _METRICS), *lengths]


def both(numbers: Numbers, view: str, metric: str) -> str:
    """`i2t / t2i` of one metric; "" where a side is missing."""
    sides = [numbers.get(f"{view}/{way}_{metric}") for way in ("i2t", "t2i")]
    return "" if None in sides else " / ".join(f"{side:.1f}" for side in sides if side is not None)


def number(value: float) -> str:
    """Percentages with one digit; numbers below ten, which may be cosines, with two."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *body] if body else []
