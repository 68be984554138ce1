"""How far a conversion is and when it will be done: a bar on a terminal, a line now and then elsewhere.

In: `Step`s. Out: text on standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from .convert import Step

EVERY = 10.0  # seconds between lines


@contextmanager
def shown() -> Iterator[Callable[[Step], None]]:
    """What `convert` calls after every entry."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = "{task.percentage:3.0f} %  {task.fields[images]:,} images, {task.fields[left_out]:,} left out"
    columns = (BarColumn(), TextColumn(text), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0, images=0, left_out=0)
        yield lambda step: bar.update(task, completed=step.done, images=step.images, left_out=step.left_out)


class Lines:
    """A line every few seconds. The rate and the ETA are those since the first step: a resumed
    conversion passes quickly over what it has."""

    def __init__(self, every: float = EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self.clock = every, clock
        self._first: tuple[float, Step] | None = None
        self._next = 0.0

    def __call__(self, step: Step) -> None:
        now = self.clock()
        if self._first is None:
            self._first, self._next = (now, step), now + self.every
        if now >= self._next:
            self._next = now + self.every
            print(self.line(step, now), file=sys.stderr, flush=True)

    def line(self, step: Step, now: float) -> str:
        assert self._first is not None, "called after the first step"
        start, first = self._first
        rate = (step.images - first.images) / max(now - start, 1e-9)
        share = step.done - first.done
        left = (now - start) * (1 - step.done) / share if share > 0 else 0.0
        eta = f", ETA {timedelta(seconds=round(left))}" if share > 0 else ""
        return f"{step.done:4.0%}  {step.images:,} images, {step.left_out:,} left out, {rate:,.0f}/s{eta}"
