"""What happened in a run: its loss and its judgements, as points over the images that it had seen.

In: a run directory. Out: points for charts; none where the run kept nothing of the kind.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from pathlib import Path

from longclip import runs

from .charts import Points
from .tables import views

MOST = 300  # points of a curve


def run_of(model: str) -> Path | None:
    """The run that a model comes from, where it was judged."""
    return runs.folder_of(model, "judgements.jsonl")


def losses(run: Path) -> dict[str, Points]:
    """The loss and its terms. What a later start did again replaces what was lost."""
    curves: dict[str, dict[float, float]] = defaultdict(dict)
    starts = sorted(run.glob("csv.*"), key=lambda folder: int(folder.suffix[1:]))
    for folder in [*starts, run / "csv"]:
        path = folder / "metrics.csv"
        for row in _rows(path) if path.is_file() else []:
            for name, value in row.items():
                if re.fullmatch("train/[^/]+", name):
                    curves[name.removeprefix("train/")][row["samples_seen"]] = value
    ordered = {name: sorted(curves[name].items()) for name in sorted(curves, key=lambda name: name != "loss")}
    return {name: line[:: math.ceil(len(line) / MOST)] for name, line in ordered.items()}


def judged(run: Path) -> dict[str, Points]:
    """View -> R@1, mean of both directions; captions that were cut have a chart of their own."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in runs.judgements(run):
        for view in views(row):
            pair = [row.get(f"{view}/{way}_r1") for way in ("i2t", "t2i")]
            if None not in pair and "/length/" not in view:
                curves[view].append((row["samples_seen"], sum(r for r in pair if r is not None) / 2))
    return dict(curves)


def _rows(path: Path) -> list[dict[str, float]]:
    """Rows that know how many images had been seen, without what they leave empty and without a torn one."""
    with open(path, newline="", encoding="utf-8") as lines:
        whole = [row for row in csv.DictReader(lines) if None not in row.values()]
    rows = [{name: float(text) for name, text in row.items() if text} for row in whole]
    return [row for row in rows if "samples_seen" in row]
