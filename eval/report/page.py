"""The report as one HTML file: no script, no font, no address in it; every text of the data is escaped.

In: results, what they are compared with, galleries, the run behind the model. Out: HTML. `page.html` beside
this file holds the layout and the style; its policy forbids scripts and the network, so that a mistake here
could not fetch or run anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from longclip import runs
from longclip.evaluate import Findings, flat
from longclip.gallery import Gallery, galleries
from longclip.pages import filled
from longclip.towers.clip import DualTower

from ..deltas import Delta, Results, compare
from ..results import find, load
from . import examples, history
from .charts import HUES, Axes, Points, chart
from .lengths import length_curves
from .tables import HEAD, cells, number, others, views

_TEMPLATE = Path(__file__).with_name("page.html")
CLIP = 77  # tokens that CLIP reads
R1 = "R@1, mean of both ways, %"
SHOWN = 8  # failures each way, and images with heat maps


class Against(NamedTuple):
    """What the results are compared with."""

    name: str
    numbers: Mapping[str, float]
    deltas: Mapping[str, Delta]


def against(results: Results, folder: str | None, run: Path | None) -> Against | None:
    """What to compare with: the results that a user names, or else the judgement before the run's first step.

    Raises:
        UserError: there are no such results, or they were not made alike.
    """
    if folder is not None:
        theirs = load(find(folder))
        return Against(folder, flat(theirs), compare(theirs, results))
    start = runs.start(run) if run else None
    if start is None:
        return None
    now = flat(results)
    shared = (name for name in now if name in start and _asked_alike(name, start, now))
    deltas = {name: Delta(start[name], now[name]) for name in shared}
    return Against(f"{run}, before its first step", start, deltas)


def _asked_alike(name: str, one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether a number of retrieval is of as many queries: else it was of another set of the same name."""
    queries = f"{name.rpartition('_')[0]}_queries"
    return one.get(queries) == other.get(queries)


def make(
    folder: Path, tower: DualTower, findings: Mapping[str, Findings], results: Results, yardstick: str | None
) -> Path:
    """Write `report.html` into a folder of results: what was kept there, with galleries of the new findings.

    Args:
        yardstick: a judged model or a folder of results to compare with; None: the start of the model's run,
            where it was judged.
    """
    run = history.run_of(next(iter(results.values())).model)
    path = folder / "report.html"
    write(path, results, galleries(tower, findings, SHOWN), against(results, yardstick, run), run)
    return path


def write(
    path: Path, results: Results, shown: Sequence[Gallery], yardstick: Against | None, run: Path | None
) -> None:
    """Write the page of one model's results; what is there is replaced."""
    first = next(iter(results.values()))
    page = filled(
        _TEMPLATE,
        title=escape(first.model),
        facts=_facts(results, yardstick),
        rules=examples.rules(shown),
        results="".join(_benchmark(name, results, yardstick) for name in results),
        lengths=_lengths(results, yardstick),
        training=_training(run) if run else "",
        galleries="".join(examples.gallery(one, number) for number, one in enumerate(shown)),
    )
    path.write_text(page, encoding="utf-8")


def _facts(results: Results, against: Against | None) -> str:
    first = next(iter(results.values()))
    protocols = dict.fromkeys(result.protocol or "data of one's own" for result in results.values())
    facts = {
        "weights": first.weights,
        "context": f"{first.context_length} tokens",
        "protocols": ", ".join(protocols),
        "judged": max(result.when for result in results.values()).replace("T", " ").replace("+00:00", " UTC"),
        "longclip": first.version,
        **({"compared with": against.name} if against else {}),
    }
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())


def _benchmark(name: str, results: Results, against: Against | None) -> str:
    result = results[name]
    seconds = f"{result.seconds:.0f} s" if result.seconds is not None else ""
    chips = "".join(
        f'<span class="chip">{escape(chip)}</span>' for chip in (result.protocol, seconds) if chip
    )
    found = _retrieval(name, result.numbers, against) + _numbers(name, result.numbers, against)
    return f'<section class="card"><header><h3>{escape(name)}</h3>{chips}</header>{found}</section>'


def _retrieval(benchmark: str, numbers: Mapping[str, float], against: Against | None) -> str:
    rows = []
    for view in views(numbers):
        changes = [_change(against, f"{benchmark}/{view}/{way}_r1") for way in ("i2t", "t2i")]
        rows.append([view, *cells(numbers, view), *changes])
    return _table(["view", *HEAD, "R@1 to text, change", "R@1 to image, change"], rows)


def _numbers(benchmark: str, numbers: Mapping[str, float], against: Against | None) -> str:
    start = against.numbers if against else {}
    rows = []
    for name in others(numbers):
        place = f"{benchmark}/{name}"
        before = number(start[place]) if place in start else ""
        rows.append([name, number(numbers[name]), before, _change(against, place)])
    return _table(["number", "value", "before", "change"], rows)


def _change(against: Against | None, name: str) -> str:
    return str(against.deltas[name]) if against and name in against.deltas else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns that hold something. On a phone, where they do not fit, a cell's column stands before it."""
    kept = [at for at in range(len(head)) if any(row[at] for row in rows)]
    names = {at: escape(head[at]) for at in kept}
    cells = [[f'<td data-name="{names[at]}">{escape(row[at])}</td>' for at in kept] for row in rows]
    lines = ["".join(f"<th>{name}</th>" for name in names.values()), *("".join(row) for row in cells)]
    table = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{table}</table></div>' if rows else ""


def _lengths(results: Results, against: Against | None) -> str:
    """A chart for each benchmark that was judged with captions cut short."""
    theirs = length_curves(against.numbers) if against else {}
    charts = ""
    for benchmark, curve in length_curves(flat(results)).items():
        lines: dict[str, Points] = {"this model": list(curve.items())}
        if against and benchmark in theirs:
            lines[against.name] = list(theirs[benchmark].items())
        axes = Axes("tokens of the caption that the model is shown", f"{benchmark}: {R1}", (0, 100))
        marked = axes._replace(x_ticks=list(curve), mark=(CLIP, f"CLIP reads {CLIP}"))
        charts += _card(chart(lines, marked))
    return f"<h2>Effective length</h2>{charts}" if charts else ""


def _training(run: Path) -> str:
    losses = chart(history.losses(run), Axes("images seen", "loss"))
    firsts = dict(list(history.judged(run).items())[:HUES])  # as many as colours tell apart
    judged = chart(firsts, Axes("images seen", R1, (0, 100)))
    charts = _card(losses) + _card(judged)
    return f"<h2>Training</h2>{charts}" if charts else ""


def _card(content: str) -> str:
    return f'<section class="card">{content}</section>' if content else ""
