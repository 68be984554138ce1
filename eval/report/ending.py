"""What a training says when it ends: what the run reached, and what to type next."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from longclip import runs

from .lengths import length_curves, plot_lengths
from .tables import table


def finish(run: Path, export: Path | None) -> dict[str, float]:
    """Print it, draw `length.png` where lengths were judged; returns the final metrics."""
    judged, start = runs.judgements(run), runs.start(run)
    metrics: dict[str, float] = json.loads((run / "metrics.json").read_text()) if judged else {}
    console = Console(width=None if Console().is_terminal else 110)
    if judged:
        which = "first and last judgement" if start else "last judgement"
        console.print(table(metrics, start, title=f"{run}: {which}"))
        console.print(f"metrics: {run / 'metrics.json'}")
    curves = length_curves(metrics)
    if curves:
        named = {name if len(curves) > 1 else run.name: curve for name, curve in curves.items()}
        plot_lengths(named, run / "length.png")
        console.print(f"effective length: {run / 'length.png'}")
    if export:
        console.print(f"export: {export}  (its README.md says how to open it)")
    console.print(f"next: python -m eval.run model={run}")  # a run, too, whose model no export can hold
    return metrics
