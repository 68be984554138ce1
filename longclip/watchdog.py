"""When nothing happens any more: write down where every thread of this process is, and end it.

A sign of life is the end of a step, a batch that arrived, a batch that was encoded; the last one covers
judgements of any length. Without one for so many minutes the stacks go to stderr and to
RUN/stacks-rankR.txt. Every process does it: the one that is in no collective has stopped the others.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from . import dist
from .stopping import AGAIN
from .types import UserError

TICKS, GRACE = 20, 2
"""The silence is counted in ticks; some more until the end, for the others to write theirs: one that leaves
breaks what they wait for."""
PATIENCE = 5.0
"""Seconds for the file: the disk may be what hangs."""


class Watchdog(Callback):
    """Watches from the start of the fit to its end; comes before `Judge` and `Checkpoints`.

    Args:
        run: the run directory.
        minutes: of silence; 0 watches nothing. Less than the strategy's `timeout_minutes`, after which the
            processes that wait for a hanging one are gone.
        end: leave with 85 ("start me again", see `stopping`) after the stacks are written; False: go on.
    """

    def __init__(self, run: str | Path, minutes: float, end: bool) -> None:
        if minutes < 0:
            raise UserError(f"watchdog.minutes is {minutes}; give minutes without a step, 0 for no watchdog")
        self.run, self.seconds, self.end = Path(run), minutes * 60, end
        self.signs, self.quiet, self.last = 0, 0, ""
        self.done = threading.Event()

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if not self.seconds:
            return
        self._sign("the start")
        module.tower.register_forward_hook(lambda *_: self._sign("a batch was encoded"))
        threading.Thread(target=self._watch, args=(trainer,), name="watchdog", daemon=True).start()

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self._sign("a batch arrived")

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self._sign("a step ended")

    def on_fit_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.done.set()

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        if self.quiet >= TICKS:  # the others were first to leave: that is all the exception says
            self._leave()
        self.done.set()

    def _sign(self, what: str) -> None:
        self.signs, self.last = self.signs + 1, what

    def _watch(self, trainer: lightning.Trainer) -> None:
        """Counts its own ticks and not the clock: a process that was stopped (Ctrl-Z) does not hang."""
        seen = 0
        while not self.done.wait(self.seconds / TICKS):
            # Where a thread keeps the interpreter to itself this one cannot run; faulthandler's can.
            faulthandler.dump_traceback_later(2 * self.seconds, file=2)
            seen, self.quiet = self.signs, self.quiet + 1 if self.signs == seen else 0
            if self.quiet == TICKS:
                self._tell(trainer.global_step)
            if self.quiet == TICKS + GRACE:
                self._leave()
        faulthandler.cancel_dump_traceback_later()

    def _tell(self, step: int) -> None:
        what = (
            f"process {dist.rank()} on {socket.gethostname()} (pid {os.getpid()}): nothing has happened for "
            f"{timedelta(seconds=round(self.seconds))} since {self.last}, {step:,} steps done; "
        )
        how = f"it ends with {AGAIN}, resume=auto goes on" if self.end else "it is left alone"
        path = self.run / f"stacks-rank{dist.rank()}.txt"
        text = f"{time.strftime('%F %T')} {what}{how} (watchdog.minutes, watchdog.end; {path})\n\n{stacks()}"
        print(text, file=sys.stderr, flush=True)
        writer = threading.Thread(target=_append, args=(path, text), daemon=True)
        writer.start()
        writer.join(PATIENCE)

    def _leave(self) -> None:
        if self.end:
            os._exit(AGAIN)  # no clean-up: it would hang, too


def stacks() -> str:
    """Where every thread of this process is, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        calls = "".join(traceback.format_stack(frame))
        parts.append(f"thread {names.get(ident, ident)}:\n{calls}")
    return "\n".join(parts)


def _append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)
