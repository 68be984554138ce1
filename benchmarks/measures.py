"""What every benchmark here shares: counting, timing side by side, and one way to tell the result.

In: functions without arguments ("jobs"), or figures. Out: numbers, and `Row`s as a table and as JSON.
FLOPs and bytes carry no noise; time does, so jobs take turns and the fastest turn of each counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from longclip.planner.counting import IN_PLACE, Watch, added_product, saving

Job = Callable[[], object]


class Row(NamedTuple):
    """One measured figure. `goal` and `met` are None where it is only told, `baseline` where none exists."""

    id: str
    measure: str  # with its unit
    ours: float
    baseline: float | None = None
    ratio: float | None = None  # how many times better ours is
    goal: str | None = None
    limit: str | None = None  # what theory allows, where it says
    met: bool | None = None


def faster(
    id: str, measure: str, ours: float, baseline: float, least: float | None = None, limit: str | None = None
) -> Row:
    """A row of two figures of which more is better: ours should be `least` times the baseline's."""
    return _compared(Row(id, measure, ours, baseline, ours / baseline, limit=limit), least)


def fewer(
    id: str, measure: str, ours: float, baseline: float, least: float | None = None, limit: str | None = None
) -> Row:
    """A row of two figures of which less is better: the baseline's should be `least` times ours."""
    return _compared(Row(id, measure, ours, baseline, baseline / ours, limit=limit), least)


def at_most(id: str, measure: str, ours: float, most: float, limit: str | None = None) -> Row:
    """A row of one figure that should not exceed `most`."""
    return Row(id, measure, ours, goal=f"<= {most:g}", limit=limit, met=ours <= most)


def flops(job: Job) -> int:
    """Floating-point operations of the job's matrix products, convolutions and attentions, counted by torch.

    Twice the multiply-adds, forward and backward as the job does them. A causal attention counts as a
    full one, since that is what torch's formula says.
    """
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(IN_PLACE, added_product)) as counter:
        job()
    return counter.get_total_flops()


def saved_bytes(job: Job) -> int:
    """Bytes that the job's forward passes keep for their backward passes, each storage once.

    Parameters and views of them are not counted: they are there anyway.
    """
    with saving() as saved:
        job()
    return sum(storage.nbytes() for storage in saved.values())


def peak_bytes(job: Job) -> int:
    """The most bytes in tensors at one time that were made since the job began.

    Counts what operators return (gradients included), not what one holds inside itself while it runs.
    For tensors of the CPU, and of the meta device: sizes that no machine holds.
    """
    with Watch() as watch:
        job()
    return watch.peak


def seconds(jobs: Mapping[str, Job], rounds: int) -> dict[str, float]:
    """This process's CPU seconds for each job, the fastest of `rounds` turns; jobs take turns.

    Wants one thread a process (`torch.set_num_threads(1)`): CPU time adds threads up.
    """
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds):
        for name, job in jobs.items():
            started = time.process_time()
            job()
            best[name] = min(best[name], time.process_time() - started)
    return best


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
    """Print the table, and how many goals are met."""
    table = Table("id", "measure", "ours", "open_clip's", "ratio", "goal", "limit", "met", title=title)
    for row in rows:
        met = {None: "", True: "[green]yes[/]", False: "[bold red]NO[/]"}[row.met]
        table.add_row(*cells(row), met)
    console = Console(width=180)
    console.print(table)
    judged = [row.met for row in rows if row.met is not None]
    console.print(f"{sum(judged)} of {len(judged)} goals met, {len(judged) - sum(judged)} not met")


def cells(row: Row) -> list[str]:
    """A row as text, all but `met`."""
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return [
        row.id,
        row.measure,
        number(row.ours),
        number(row.baseline),
        ratio,
        row.goal or "",
        row.limit or "",
    ]


def number(value: float | None) -> str:
    """Three digits or whole, with a prefix from a million on.

    >>> [number(v) for v in (0.01234, 12.34, 1234.5, 3.3e10)]
    ['0.0123', '12.3', '1,234', '33.0 G']
    """
    if value is None:
        return ""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(value) >= factor:
            return f"{value / factor:,.1f} {prefix}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as a JSON list of objects."""
    path.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")


def load(path: Path) -> list[Row]:
    """What `save` wrote."""
    return [Row(**row) for row in json.loads(path.read_text())]


def _compared(row: Row, least: float | None) -> Row:
    if least is None:
        return row
    assert row.ratio is not None
    return row._replace(goal=f"ratio >= {least:.3g}", met=row.ratio >= least)
