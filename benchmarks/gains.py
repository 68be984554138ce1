"""What fine-tuning gained and lost, recipe by recipe: a table, and a picture of the ways from the start.

In: what the start, fine-tuned models and those between were judged to be (`Told`). Out: Markdown, a PNG.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import documents
from .trainings import Found, Numbers, cell

TELLS = """The first line is the pretrained model, stretched as by `long`: R@1 in %, mean of both
directions. All others are points above or below it, mean over seeds (lowest to highest). Brief: the caption
cut at 40 tokens. Lost to order: points of R@1 that go when the first sentence moves to place 4, and when all
are shuffled, mean of both. Half way: the mean of the weights of the start and of the first seed's model."""

PHOTOS = "Photos: R@10 of single photos by single captions, which the model was pretrained on."

Between = dict[str, dict[str, Numbers]]
"""Recipe -> share of the fine-tuned model -> what the model between it and the start was judged to be."""


class Told(NamedTuple):
    """All that was found."""

    start: Numbers
    found: Found
    between: Between


def columns(benchmark: str) -> dict[str, tuple[str, ...]]:
    """Column -> the numbers that it is the mean of."""
    ways = ("i2t_r1", "t2i_r1")
    photos = tuple(f"mosaics/photos/captions/{way}" for way in ("i2t_r10", "t2i_r10"))
    return {
        "long": tuple(f"{benchmark}/long/{way}" for way in ways),
        "brief": tuple(f"{benchmark}/length/40/{way}" for way in ways),
        "first sentence": tuple(f"{benchmark}/short/{way}" for way in ways),
        **({"photos": photos} if benchmark == "mosaics" else {}),
        "lost to order": tuple(f"{benchmark}/diagnostics/order/{d}/lost" for d in ("moved", "shuffled")),
        "swaps": (f"{benchmark}/swaps/accuracy",),
        "pointing": (f"{benchmark}/pointing/accuracy",),
    }


def markdown(benchmark: str, told: Told) -> str:
    """What every recipe gains and loses, and so the model half way to it."""
    parts = columns(benchmark)
    head = ["recipe", *parts, "half way: long", "half way: brief"]
    lines = [["the start", *(cell({0: told.start}, names) for names in parts.values()), "-", "-"]]
    ranked = sorted(told.found.items(), key=lambda pair: -_mean(pair[1].values(), parts["long"]))
    for name, seeds in ranked:
        half = {0: told.between[name]["0.5"]} if name in told.between else {}
        ways = [cell(half, parts[part], told.start) for part in ("long", "brief")]
        lines.append([name, *(cell(seeds, names, told.start) for names in parts.values()), *ways])
    picture = f"![R@1 of brief and of whole captions, recipe by recipe](finetuning-{benchmark}.png)"
    tells = f"{TELLS} {PHOTOS}" if "photos" in parts else TELLS
    return "\n\n".join([documents.table(head, lines), tells, picture])


def _mean(seeds: Iterable[Numbers], names: Sequence[str]) -> float:
    return statistics.mean(numbers[name] for numbers in seeds for name in names)


def plot(benchmark: str, told: Told, path: Path) -> None:
    """Every recipe's way from the start: R@1 of brief captions across, of whole ones upwards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = columns(benchmark)
    figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
    for number, (name, seeds) in enumerate(told.found.items()):
        steps = [[numbers] for numbers in told.between.get(name, {}).values()]
        way = [[told.start], *steps, list(seeds.values())]
        brief, long = ([_mean(one, parts[part]) for one in way] for part in ("brief", "long"))
        axes.plot(brief, long, "-", color=f"C{number % 10}", alpha=0.5, linewidth=1)
        axes.plot(brief[-1:], long[-1:], "osD^v"[number // 10 % 5], color=f"C{number % 10}", label=name)
    axes.set(xlabel="R@1 of captions cut at 40 tokens (%)", ylabel="R@1 of whole captions (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, ncols=-(-len(told.found) // 28))
    figure.savefig(path, dpi=130)
    plt.close(figure)
