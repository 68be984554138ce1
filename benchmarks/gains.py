"""What fine-tuning gained and lost, recipe by recipe: a table, and a picture of the ways from the start.

In: what the start, fine-tuned models and those between were judged to be (`Told`). Out: Markdown, a PNG.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.report import length_curves

from . import documents
from .trainings import Found, Numbers, cell, curve, means

TELLS = """The first line is the pretrained model, stretched as by `long`: {recall} in %, mean of both
directions. All others are points above or below it, mean over seeds (lowest to highest). Brief: the caption
cut at 40 tokens. {more} Half way: the mean of the weights of the start and of the first seed's model. FLOPs:
those of an image beside `long`'s; within 15 % the run at equal steps counts as that at equal FLOPs."""


class Benchmark(NamedTuple):
    """How the judgements of one benchmark are told."""

    recall: str
    known: str  # the column of what the start could do already, and a fine-tuned model may forget
    own: dict[str, tuple[str, ...]]  # columns beside those of all
    lengths: bool  # whether there is an effective length to tell: a curve of R@1
    more: str


BENCHMARKS = {
    "scenes": Benchmark(
        "R@1",
        "brief",
        {"lost to order": ("scenes/diagnostics/order/moved/lost", "scenes/diagnostics/order/shuffled/lost")},
        True,
        """Lost to order: points of R@1 that go when the first sentence moves to place 4, and when all
are shuffled, mean of both. Effective length: tokens at which 95 % of the R@1 at 248 are reached.""",
    ),
    "mosaics": Benchmark(
        "R@10",  # a model that has seen few photos has hardly any R@1 to gain or lose
        "photos",
        {"photos": ("mosaics/photos/captions/i2t_r10", "mosaics/photos/captions/t2i_r10")},
        False,
        "Photos: single ones by single captions, which the model was pretrained on.",
    ),
}

FAR = 10.0
"""Points below the start from which on a model is named beside the picture, whose scale it would take."""

Between = dict[str, dict[str, Numbers]]
"""Recipe -> share of the fine-tuned model -> what the model between it and the start was judged to be."""


class Told(NamedTuple):
    """All that was found."""

    start: Numbers
    found: Found
    between: Between
    paid: Found  # at equal FLOPs
    costs: Mapping[str, float]  # FLOPs an image beside those of `long`


def columns(benchmark: str) -> dict[str, tuple[str, ...]]:
    """Column -> the numbers that it is the mean of."""

    told = BENCHMARKS[benchmark]
    cut = told.recall.replace("@", "").lower()

    def recall(view: str) -> tuple[str, ...]:
        return tuple(f"{benchmark}/{view}/{way}_{cut}" for way in ("i2t", "t2i"))

    return {
        "long": recall("long"),
        "brief": recall("length/40"),
        "first sentence": recall("short"),
        **told.own,
        "swaps": (f"{benchmark}/swaps/accuracy",),
        "pointing": (f"{benchmark}/pointing/accuracy",),
    }


def markdown(benchmark: str, told: Told) -> str:
    """What every recipe gains and loses, and so the model half way to it."""
    parts = columns(benchmark)
    recall, known, _, lengths, more = BENCHMARKS[benchmark]
    reach = ["effective length"] if lengths else []
    head = ["recipe", *parts, *reach, "half way: long", f"half way: {known}", "FLOPs", "long at equal FLOPs"]
    first = [cell({0: told.start}, names) for names in parts.values()]
    lines = [["the start", *first, *(_reach({0: told.start}, benchmark) for _ in reach), *"----"]]
    ranked = sorted(told.found.items(), key=lambda pair: -_mean(pair[1], parts["long"]))
    for name, seeds in ranked:
        half = {0: told.between[name]["0.5"]} if name in told.between else {}
        ways = [cell(half, parts[part], told.start) for part in ("long", known)]
        equal = [f"{told.costs[name]:.2f}", cell(told.paid.get(name, {}), parts["long"], told.start)]
        own = [cell(seeds, names, told.start) for names in parts.values()]
        lines.append([name, *own, *(_reach(seeds, benchmark) for _ in reach), *ways, *equal])
    tells = TELLS.format(recall=recall, more=more)
    picture = f"![What is gained and what is lost, recipe by recipe](finetuning-{benchmark}.png)"
    return "\n\n".join([documents.table(head, lines), tells, picture])


def _reach(seeds: Mapping[int, Numbers], benchmark: str) -> str:
    """Tokens from which on more of them hardly help; "-" where no lengths were judged."""
    from longclip.evaluate.diagnostics.lengths import crossing

    if not all(benchmark in length_curves(numbers) for numbers in seeds.values()):
        return "-"
    return f"{crossing(curve(seeds, benchmark).mean, 0.95):.0f}"


def _mean(seeds: Mapping[int, Numbers], names: Sequence[str]) -> float:
    return statistics.mean(means(seeds, names))


def plot(benchmark: str, told: Told, path: Path) -> None:
    """Where every recipe ends, and its way there: recall of what was known across, of whole ones upwards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = columns(benchmark)
    recall, across, *_ = BENCHMARKS[benchmark]
    outside: list[str] = []
    figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
    origin = [_mean({0: told.start}, parts[part]) for part in (across, "long")]
    for number, (name, seeds) in enumerate(told.found.items()):
        steps = [{0: numbers} for numbers in told.between.get(name, {}).values()]
        way = [{0: told.start}, *steps, seeds]
        known, long = ([_mean(one, parts[part]) for one in way] for part in (across, "long"))
        if known[-1] < known[0] - FAR or long[-1] < long[0] - FAR:
            outside.append(f"{name} {known[-1]:.0f} / {long[-1]:.0f}")
            continue
        if steps:  # where nothing between was judged, a straight line would be made up
            axes.plot(known, long, "-", color=f"C{number % 10}", alpha=0.5, linewidth=1)
        axes.plot(known[-1:], long[-1:], "osD^v"[number // 10 % 5], color=f"C{number % 10}", label=name)
    axes.plot(origin[:1], origin[1:], "*", color="black", markersize=12, label="the start")
    axes.set(xlabel=f"{recall}, {across} (%)", ylabel=f"{recall}, whole captions (%)")
    axes.set_title(f"below, not shown: {', '.join(outside)}" if outside else "", fontsize=8)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, ncols=-(-len(told.found) // 28))
    figure.savefig(path, dpi=130)
    plt.close(figure)
