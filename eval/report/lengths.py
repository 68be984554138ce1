"""The effective-length curve: R@1 against the tokens of the caption that the model is shown.

In: flat numbers named `BENCHMARK/length/77/i2t_r1`. Out: points, and a picture of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

Curve = dict[int, float]
"""Tokens shown -> mean R@1 of both directions, in percent."""


def length_curves(numbers: Mapping[str, float]) -> dict[str, Curve]:
    """The curve of every benchmark that has one."""
    curves: dict[str, Curve] = defaultdict(dict)
    for name in numbers:
        found = re.fullmatch(r"((.*?)/?length/(\d+))/i2t_r1", name)
        if found:
            both = numbers[f"{found[1]}/i2t_r1"] + numbers[f"{found[1]}/t2i_r1"]
            curves[found[2]][int(found[3])] = both / 2
    return {benchmark: dict(sorted(curve.items())) for benchmark, curve in curves.items()}


def plot_lengths(curves: Mapping[str, Curve], path: Path, spread: Mapping[str, Curve] | None = None) -> None:
    """Draw curves, with error bars where there is a spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, curve in curves.items():
        error = [spread[name][length] for length in curve] if spread else None
        axes.errorbar(list(curve), list(curve.values()), yerr=error, marker="o", capsize=3, label=name)
    axes.axvline(77, color="0.7", linestyle=":", zorder=0)
    axes.annotate("CLIP's window", (76, 99), rotation=90, color="0.5", ha="right", va="top", fontsize=8)
    axes.set(
        xlabel="caption cut to this many tokens", ylabel="R@1, mean of both directions (%)", ylim=(0, 101)
    )
    axes.set_xticks(sorted({length for curve in curves.values() for length in curve}))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=130)
    plt.close(figure)
