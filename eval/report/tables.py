"""Numbers as rows for people: printed, and as Markdown.

In: flat name -> number, and the same of the model that it started from or is compared with. Retrieval gets
a row for each view, with image to text / text to image in one cell; every other number has its own row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

Numbers = Mapping[str, float]

HEAD = ("R@1", "R@5", "R@10", "median rank")
NOTE = "image to text / text to image, percent"
_METRICS = ("r1", "r5", "r10", "median")
_WAY = re.compile(r"(?:(.*)/)?(i2t|t2i)_(\w+)")


def table(numbers: Numbers, start: Numbers | None, title: str) -> Table:
    """What a terminal shows: all numbers, and R@1 and the others as they were at the start."""
    shown = Table("", *HEAD, "R@1 at start", title=title, title_justify="left", caption=NOTE)
    for view in views(numbers):
        shown.add_row(view, *cells(numbers, view), both(start or {}, view, "r1"))
    for name in others(numbers):
        before = number(start[name]) if start and name in start else ""
        shown.add_row(name, number(numbers[name]), "", "", "", before)
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
    """The names of all other numbers."""
    return [name for name in numbers if not _WAY.fullmatch(name)]


def cells(numbers: Numbers, view: str) -> list[str]:
    """A view's cells below HEAD."""
    return [both(numbers, view, metric) for metric in _METRICS]


def both(numbers: Numbers, view: str, metric: str) -> str:
    """`i2t / t2i` of one metric; "" where a side is missing."""
    sides = [numbers.get(f"{view}/{way}_{metric}") for way in ("i2t", "t2i")]
    return "" if None in sides else " / ".join(number(side) for side in sides if side is not None)


def number(value: float) -> str:
    return f"{value:.1f}"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *body] if body else []
