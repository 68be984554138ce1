"""Results for people: the table at the end of a run, and the effective-length curve.

In: a run directory (metrics.json, judgements.jsonl). Out: a printed table, `length.png`, the next command.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from longclip import runs


def finish(run: Path, export: Path | None) -> dict[str, float]:
    """Print what the run reached and what to type next; returns the final metrics."""
    judged = runs.judgements(run)
    metrics = json.loads((run / "metrics.json").read_text()) if judged else {}
    console = Console(width=None if Console().is_terminal else 110)
    if judged:
        console.print(table(metrics, judged[0], title=f"{run}: first and last judgement"))
        console.print(f"metrics: {run / 'metrics.json'}")
    curve = length_curve(metrics)
    if curve:
        plot_lengths({run.name: curve}, run / "length.png")
        console.print(f"effective length: {run / 'length.png'}")
    if export:
        console.print(
            f"open_clip folder: {export}  (open_clip.create_model_and_transforms('local-dir:{export}'))"
        )
        console.print(f"next: python -m eval.run model={export}")
    else:
        console.print(f"next: longclip export {run} --out {run / 'export'}")
    return metrics


def table(metrics: dict[str, float], first: dict[str, float] | None, title: str) -> Table:
    """Metric rows, one line for both directions: R@1, R@5, R@10 and median rank; other numbers below."""
    shown = Table("", "R@1", "R@5", "R@10", "median rank", "R@1 at start", title=title, title_justify="left")
    for view, found in _views(metrics).items():
        both = [
            " / ".join(_number(found[f"{side}_{what}"]) for side in ("i2t", "t2i"))
            for what in ("r1", "r5", "r10", "median")
        ]
        start = [(first or {}).get(f"{view}/{side}_r1") for side in ("i2t", "t2i")]
        shown.add_row(view, *both, " / ".join("" if s is None else _number(s) for s in start))
    for name, value in metrics.items():
        if not re.search(r"/(i2t|t2i)_\w+$", name):  # the others have a row of their own
            start_value = (first or {}).get(name)
            shown.add_row(
                name, _number(value), "", "", "", "" if start_value is None else _number(start_value)
            )
    shown.caption = "image to text / text to image, percent"
    return shown


def _number(value: float) -> str:
    return f"{value:.1f}"


def _views(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    views: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in metrics.items():
        view, _, metric = name.rpartition("/")
        if metric.startswith(("i2t_", "t2i_")):
            views[view][metric] = value
    return views


def length_curve(metrics: dict[str, float]) -> dict[int, float]:
    """Tokens shown -> mean R@1 of both directions, from metrics named `.../length/77/i2t_r1`."""
    curve: dict[int, float] = {}
    for name in metrics:
        found = re.search(r"^(.*/length/(\d+))/i2t_r1$", name)
        if found:
            curve[int(found[2])] = (metrics[f"{found[1]}/i2t_r1"] + metrics[f"{found[1]}/t2i_r1"]) / 2
    return dict(sorted(curve.items()))


def plot_lengths(
    curves: dict[str, dict[int, float]], path: Path, spread: dict[str, dict[int, float]] | None = None
) -> None:
    """The effective-length curve: R@1 against the tokens of the caption that the model is shown."""
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
