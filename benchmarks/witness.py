"""What a run was really trained on: every process writes a line before each update, and they are joined here.

In: the folder in which the processes of all starts of a run wrote. Out: the run's `History`.

A line comes before the update that it tells of, so no update goes untold: one that was told and did not
happen any more is told again by the next start, which must then say the same.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from longclip import dist
from longclip.callbacks import Judge


class Witness(Judge):
    """Writes down the samples and the loss of every step; given by `judge._target_`.

    Args:
        folder: where to write, on a disk that no fault reaches.
        number: which start of the run this is, from 1.
        others: of `Judge`.
    """

    def __init__(self, folder: str, number: int, **others: Any) -> None:
        super().__init__(**others)
        self.folder, self.number = Path(folder), number

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.number:04d}-{dist.rank()}.jsonl"
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        super().on_train_start(trainer, module)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.keys = batch.keys

    def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
        self.loss = float(loss.detach()).hex()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        line = Line(trainer.global_step + 1, self.keys, self.loss, time.time())
        os.write(
            self.file, (json.dumps(line) + "\n").encode()
        )  # one call: a kill leaves a whole line or none


class Line(NamedTuple):
    """One step on one process."""

    step: int  # from 1
    keys: list[str]
    loss: str  # every bit of it
    time: float


class History(NamedTuple):
    """All starts of a run as one.

    Attributes:
        told: (step, process) -> its samples and its loss, as the last start told them.
        replayed: steps that more than one start took, each time counted.
        differing: (step, process) where a start told something else than one before it.
        starts: start -> step -> the time at which process 0 took it; of starts that took any.
    """

    told: dict[tuple[int, int], tuple[list[str], str]]
    replayed: int
    differing: list[tuple[int, int]]
    starts: dict[int, dict[int, float]]


def read(path: Path) -> list[Line]:
    """What one process of one start wrote so far."""
    if not path.exists():
        return []
    return [
        Line(*json.loads(line)) for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"
    ]


def joined(folder: Path) -> History:
    """What all processes of all starts wrote."""
    history = History({}, 0, [], {})
    for path in sorted(folder.glob("*.jsonl")):
        start, rank = map(int, path.stem.split("-"))
        lines = read(path)
        for line in lines:
            place, said = (line.step, rank), (line.keys, line.loss)
            if history.told.get(place, said) != said:
                history.differing.append(place)
            history.told[place] = said
        if rank == 0 and lines:
            history.starts[start] = {line.step: line.time for line in lines}
    taken = sum(map(len, history.starts.values()))
    return history._replace(replayed=taken - len({step for step, _ in history.told}))


def not_once(history: History, keys: Collection[str], steps: int, world: int) -> list[str]:
    """What keeps it from being true that every epoch showed every sample exactly once; [] where it is true.

    Args:
        keys: of all samples; an epoch is a whole number of steps.
        steps: of the whole run, a whole number of epochs.
    """
    found = []
    of_step: dict[int, list[str]] = {step: [] for step in range(1, steps + 1)}
    for (step, _), (shown, _) in history.told.items():
        of_step.setdefault(step, []).extend(shown)
    epoch = len(keys) * steps // max(sum(map(len, of_step.values())), 1)
    if len(history.told) != steps * world or len(of_step) != steps or not epoch:
        return [f"{len(history.told)} of {steps} steps x {world} processes were taken"]
    for first in range(1, steps + 1, epoch):
        shown_here = Counter(key for step in range(first, first + epoch) for key in of_step.get(step, []))
        odd = {key: shown_here[key] for key in {*keys, *shown_here} if shown_here[key] != (key in set(keys))}
        found += [f"steps from {first}: {key} came {count} times" for key, count in sorted(odd.items())]
    return found
