"""A search as text: what was indexed, and a table of the pictures that fit a query."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .index import Index
from .query import WINDOW, Answer, Result

NAMED = 5  # damaged pictures that are named


def facts(index: Index) -> list[str]:
    """What is in an index, and what is not, a line each."""
    lines = [
        f"{len(index.files):,} pictures in {index.root}: {index.embedded:,} embedded now, the others known"
    ]
    if index.gone:
        lines.append(f"dropped: {index.gone:,}, as their pictures are gone or have changed")
    if index.damaged:
        named = [f"  {file.shown}: {why}" for file, why in list(index.damaged.items())[:NAMED]]
        more = len(index.damaged) - len(named)
        lines += [f"cannot be read: {len(index.damaged):,}", *named]
        lines += [f"  and {more:,} more"] * (more > 0)
    if index.passed_over:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in index.passed_over.most_common(6))
        lines.append(f"passed over: {counts}")
    return lines


def limits(answer: Answer) -> str:
    """How long a query is, and whether the model reads all of it."""
    read = f"{len(answer.sentences)} sentence{'s' * (len(answer.sentences) != 1)}, {answer.tokens} tokens"
    if answer.unseen:
        return f"{read}; the model does not read the last {answer.unseen}: shorten the query"
    return read


def table(answer: Answer) -> Group:
    """The sentences by number, and the pictures with their place for each of them."""
    told = Text("\n".join(f"{number}  {text}" for number, text in enumerate(answer.sentences, 1)), "dim")
    shown = Table(title=limits(answer), title_justify="left", caption_justify="left")
    shown.add_column("#", justify="right")
    shown.add_column("picture", overflow="fold")
    shown.add_column("score", justify="right")
    shown.add_column("place by sentence " + " ".join(map(str, range(1, len(answer.sentences) + 1))))
    windowed = any(result.window_place for result in answer.results)
    if windowed:
        shown.add_column(f"by {WINDOW} tokens", justify="right")
    for place, result in enumerate(answer.results, 1):
        window = [str(result.window_place)] if windowed else []
        shown.add_row(str(place), Text(result.path), f"{result.score:.3f}", _places(result), *window)
    shown.caption = "bold: the sentence that sets the picture apart most"
    return Group(told, shown)


def _places(result: Result) -> Text:
    places = [
        (str(fit.place), "bold" if number == result.strongest else "")
        for number, fit in enumerate(result.fits)
    ]
    return Text("  ").join(Text(*place) for place in places)
