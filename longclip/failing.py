"""When one process fails all of them end, soon, and say what the first one said.

A process that fails leaves a note in the run directory before it goes: failure-DATE.txt. The others lose
their connection to it, or wait in a collective until the process group's timeout; then they read the note.
A process that was killed leaves none, and the others say that.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import torch.distributed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from . import dist
from .types import Elsewhere, UserError

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds for the note of a process that is known to have failed
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
        if self.note is None and isinstance(exception, torch.distributed.DistStoreError):
            raise UserError(
                f"the processes did not all meet ({exception}); what the missing ones printed says why: "
                "start all again with resume=auto; python -m longclip.preflight finds what keeps them apart"
            ) from exception
        if self.note is None or dist.world() == 1 or isinstance(exception, (SystemExit, KeyboardInterrupt)):
            return
        first = who_was_first(self.note, exception)
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):  # torchrun and srun do it themselves
            launcher.kill(signal.SIGKILL)
        if first is not None:
            raise UserError(first) from exception


def lost(exception: BaseException) -> bool:
    """Whether this says no more than that another process does not answer."""
    backend = isinstance(exception, torch.distributed.DistError)
    return backend or (isinstance(exception, RuntimeError) and bool(LOST.search(str(exception))))


def who_was_first(note: Path, exception: BaseException) -> str | None:
    """Leave the note, unless another process was first: what to say then, None for the exception's words."""
    if isinstance(exception, Elsewhere):
        deadline = time.monotonic() + PATIENCE
        while not note.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    elif not lost(exception) and _leave(note, str(exception)):
        return None
    if note.exists():
        return f"process {dist.rank()} stops because another failed first: {note.read_text()}"
    if isinstance(exception, Elsewhere):
        return None
    details = str(exception).splitlines()
    return (
        f"process {dist.rank()} does not hear from the others any more, and none of them left a message: one "
        "was killed (out of memory?), hangs, found the disk full, or its machine is gone. What is saved is "
        f"intact, and resume=auto goes on from there. ({details[0] if details else 'no details'})"
    )


def _leave(note: Path, message: str) -> bool:
    """Write the note, whole or not at all; False where there is one already."""
    partial = note.with_name(f".{note.name}.{dist.rank()}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(f"process {dist.rank()} on {socket.gethostname()} (pid {os.getpid()}): {message}")
        os.link(partial, note)
    except FileExistsError:
        return False
    except OSError as error:  # a full disk may be the very reason
        log.warning("no note of the failure could be left in %s (%s)", note.parent, error.strerror)
    finally:
        with suppress(OSError):
            partial.unlink()
    return True
