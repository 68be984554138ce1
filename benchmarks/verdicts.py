"""What a soak shows: whether the run under faults equals the calm one, and what each fault cost.

In: both runs, how the starts ended, what the witnesses told. Out: `Verdict`s and `Loss`es.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from longclip import runs
from longclip.stored import Stored

from .enduring import PATIENCE, WORLD, Ended, Run
from .faults import AGAIN, TERM, TORN
from .witness import History, joined, not_once

CODES = {TERM: 143, AGAIN: 85}


class Verdict(NamedTuple):
    """A claim, whether it held, and on what that rests."""

    claim: str
    met: bool
    seen: str


class Loss(NamedTuple):
    """What a fault cost."""

    kind: str
    early: bool
    codes: list[int]
    ending: float  # seconds until both processes had ended
    steps: int  # taken, and to be taken again
    seconds: float  # until the run was where it had been


def judge(calm: Run, run: Run, keys: Collection[str], ends: Sequence[Ended]) -> list[Verdict]:
    """Everything that a soak claims; both run directories are read."""
    quiet, told = joined(calm.witnesses), joined(run.witnesses)
    odd = sorted(place for place, said in quiet.told.items() if told.told.get(place) != said)
    again = f"{told.replayed} steps taken again"
    slow = max((ended.seconds for ended in ends), default=0.0)
    torn = [ended for ended in ends if ended.fault and ended.fault.kind == TORN]
    passed = [ended for ended in torn if ended.torn and _passed_over(run.home, ended)]
    signals = [ended for ended in ends if ended.fault and ended.fault.kind in CODES and not ended.fault.early]
    early = [ended for ended in signals if set(ended.codes) != {CODES[_kind(ended)]}]
    wrong = not_once(told, keys, run.steps, WORLD)
    alone = [ended.number for ended in ends if ended.fault is None and not ended.done]
    return [
        Verdict("the run was finished", ends[-1].done, f"after {len(ends)} starts"),
        Verdict("its weights and moments are those of the calm run, bit by bit", *_same(calm, run)),
        Verdict("so is the loss of every step", not odd, f"{len(quiet.told)} losses, {len(odd)} differ"),
        Verdict(
            "every epoch showed every sample exactly once",
            not wrong,
            wrong[0] if wrong else f"{run.steps} steps, {len(keys)} samples",
        ),
        Verdict(
            "a step taken again had the same samples and loss",
            not told.differing,
            f"{again}, {len(told.differing)} differed",
        ),
        Verdict("nothing hung", slow < PATIENCE, f"at most {slow:.1f} s from a fault to the end of both"),
        Verdict(
            "a torn checkpoint was passed over", len(passed) == len(torn), f"{len(passed)} of {len(torn)}"
        ),
        Verdict("a signal ended both processes with its code", not early, f"{len(signals)} signals"),
        Verdict("no start ended without a fault of the schedule", not alone, f"starts {alone or 'none'}"),
    ]


def lost(ends: Sequence[Ended], history: History, finished: float) -> list[Loss]:
    """What every fault cost, from what the witnesses told; `finished` is when the run ended."""
    found = []
    for ended in ends:
        if ended.fault is None:
            continue
        own = history.starts.get(ended.number, {})
        later = {n: taken for n, taken in history.starts.items() if n > ended.number}
        first = min(later[min(later)]) if later and own else None
        high = max((max(taken) for n, taken in history.starts.items() if n <= ended.number), default=0)
        back = min(
            (at for taken in later.values() for step, at in taken.items() if step > high), default=None
        )
        found.append(
            Loss(
                ended.fault.kind,
                ended.fault.early is not None,
                ended.codes,
                ended.seconds,
                max(own) + 1 - first if first else 0,
                (back or finished) - ended.struck,
            )
        )
    return found


def _same(calm: Run, run: Run) -> tuple[bool, str]:
    one, two = (Stored(_last(each)) for each in (calm, run))
    if one.shapes != two.shapes:
        return False, "other tensors"
    odd = [name for name in one.shapes if not torch.equal(one.read(name), two.read(name))]
    return not odd, f"{len(one.shapes)} tensors at step {run.steps}, {len(odd)} differ"


def _last(run: Run) -> Path:
    return run.folder / "checkpoints" / runs.checkpoint_name(run.steps)


def _kind(ended: Ended) -> str:
    assert ended.fault is not None
    return ended.fault.kind


def _passed_over(home: Path, ended: Ended) -> bool:
    """Whether the next start said so."""
    said = home / f"start-{ended.number + 1:04d}-0.txt"
    return any("passed over:" in line and str(ended.torn) in line for line in said.read_text().splitlines())
