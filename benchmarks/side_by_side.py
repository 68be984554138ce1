"""Recipes side by side in a picture: a row a recipe, a panel a number, a bar from lowest to highest seed.

In: what runs were judged to be, at equal steps and at equal FLOPs. Out: a PNG.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from .trainings import Found, means

Parts = Mapping[str, Sequence[str]]
"""Panel -> the numbers that it shows the mean of."""


def plot(found: Found, paid: Found, parts: Parts, path: Path) -> None:
    """The best in the first panel on top; where they differ, runs at equal FLOPs are rings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ranked(found, next(iter(parts.values())))[::-1]
    figure, panels = plt.subplots(
        1, len(parts), figsize=(3.0 * len(parts), 0.9 + 0.24 * len(names)), sharey=True, layout="constrained"
    )
    for axes, (title, numbers) in zip(panels, parts.items(), strict=True):
        for runs, ring, shift in ((paid, True, -0.22), (found, False, 0.0)):
            for row, name in enumerate(names):
                if values := means(runs.get(name, {}), numbers):
                    low, middle, high = min(values), statistics.mean(values), max(values)
                    colour = "C1" if ring else "C0"
                    axes.plot([low, high], [row + shift] * 2, color=colour, linewidth=2, alpha=0.45)
                    axes.plot(middle, row + shift, "o", color=colour, fillstyle="none" if ring else "full")
        axes.set_title(title, fontsize=10)
        axes.grid(axis="both", alpha=0.25)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(-0.7, len(names) - 0.3)
    told = "filled: equal steps; rings: equal FLOPs" if paid else "at equal steps"
    figure.supxlabel(f"{told}; bars: lowest to highest seed", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def ranked(found: Found, numbers: Sequence[str]) -> list[str]:
    """By the mean over seeds of these numbers, the best first."""
    return sorted(found, key=lambda name: -statistics.mean(means(found[name], numbers)))
