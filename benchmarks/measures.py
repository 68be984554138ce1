"""What every benchmark here shares: timing side by side, and one way to tell the result.

In: functions to time, or figures. Out: `Row`s, as a table and as JSON: a list of {"id", "measure",
"ours", "baseline", "ratio", "goal", "met"}. `ratio` is ours / baseline where both are known; `goal` and
`met` are null where a figure is only told.

Machines are shared and noisy, so jobs take turns and the fastest turn of each piece of work counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table


class Row(NamedTuple):
    """One measured figure."""

    id: str
    measure: str  # with its unit
    ours: float
    baseline: float | None = None
    ratio: float | None = None
    goal: str | None = None
    met: bool | None = None


def faster(id: str, measure: str, ours: float, baseline: float, least: float | None = None) -> Row:
    """A row of two rates, of which ours should be at least `least` times the baseline's."""
    ratio = ours / baseline
    goal = None if least is None else f"ratio >= {least:g}"
    return Row(id, measure, ours, baseline, ratio, goal, None if least is None else ratio >= least)


def at_most(id: str, measure: str, ours: float, most: float) -> Row:
    """A row of one figure that should not exceed `most`."""
    return Row(id, measure, ours, goal=f"<= {most:g}", met=ours <= most)


def rates(jobs: Mapping[str, tuple[Callable[[Any], object], Sequence[Any]]], rounds: int) -> dict[str, float]:
    """Items per second of this thread's CPU time, for every job: per item the fastest of `rounds` turns.

    Items of all jobs should take about as long: short ones find more quiet moments than long ones.
    """
    best = {name: [float("inf")] * len(items) for name, (_, items) in jobs.items()}
    for _ in range(rounds):
        for name, (job, items) in jobs.items():
            for place, item in enumerate(items):
                started = time.thread_time()
                job(item)
                best[name][place] = min(best[name][place], time.thread_time() - started)
    return {name: len(seconds) / sum(seconds) for name, seconds in best.items()}


def show(rows: Sequence[Row], title: str) -> None:
    table = Table("id", "measure", "ours", "open_clip's", "ratio", "goal", "met", title=title)
    for row in rows:
        met = {None: "", True: "yes", False: "NO"}[row.met]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(
            row.id, row.measure, _number(row.ours), _number(row.baseline), ratio, row.goal or "", met
        )
    Console(width=160).print(table)


def save(rows: Sequence[Row], path: Path) -> None:
    path.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
