"""When one process fails all of them end, soon, and say what the first one said.

A process that fails leaves a note in the run directory before it goes: failure-DATE.txt. The others lose
their connection to it, or wait in a collective until the process group's timeout; then they read the note.
A process that was killed leaves none, and the others say that.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import lightning
import torch.distributed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from . import dist
from .types import UserError

LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|timed? ?out", re.IGNORECASE)


class Together(Callback):
    """Leaves the note, reads it, and ends the processes that Lightning started; comes after `Checkpoints`.

    Args:
        run: the run directory, which all processes see.
    """

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run)
        self.note: Path | None = None

    def setup(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        """A note of this start has a name of its own."""
        self.note = self.run / trainer.strategy.broadcast(f"failure-{time.strftime('%Y%m%d-%H%M%S')}.txt")

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        if self.note is None or dist.world() == 1 or isinstance(exception, (SystemExit, KeyboardInterrupt)):
            return
        first = leave(self.note, str(exception), lost(exception))
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):  # torchrun and srun do it themselves
            launcher.kill(signal.SIGKILL)
        if first is not None:
            raise UserError(first) from exception


def lost(exception: BaseException) -> bool:
    """Whether this says no more than that another process does not answer."""
    backend = isinstance(exception, torch.distributed.DistError)
    return backend or (isinstance(exception, RuntimeError) and bool(LOST.search(str(exception))))


def leave(note: Path, message: str, lost: bool) -> str | None:
    """Write the note, unless another process was first; what there is to say then, None for the first."""
    if not lost:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            with open(note, "x") as file:
                file.write(f"process {dist.rank()} on {socket.gethostname()} (pid {os.getpid()}): {message}")
            return None
        except FileExistsError:
            pass
    if note.exists():
        return f"process {dist.rank()} stops because another failed first: {note.read_text()}"
    return (
        f"process {dist.rank()} does not hear from the others any more, and none of them left a message: one "
        "was killed (out of memory?), hangs, or its machine is gone. What is saved is intact, and "
        f"resume=auto goes on from there. ({message.splitlines()[0] if message else 'no details'})"
    )
