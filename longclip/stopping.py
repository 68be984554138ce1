"""Asked to stop: a signal asks on one process, the end of the step answers on all.

    SIGUSR1   save, end with 85: "start me again" (SLURM's --signal=USR1@120, before the time is up)
    SIGTERM   save, end with 143: the machine is taken away (scancel, Kubernetes, a spot instance)

Nothing is done inside the signal handler, which may run in the middle of a collective or an update.
Outside the steps (building, judging at the start and at the end) the process ends at once with the
same codes, and the next start goes on from the newest checkpoint.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
from typing import Any

import torch.distributed
from lightning.pytorch.callbacks import Callback

from . import dist

log = logging.getLogger(__name__)

AGAIN, TAKEN = 85, 128 + signal.SIGTERM
CODES = {signal.SIGUSR1: AGAIN, signal.SIGTERM: TAKEN}
"""Signal -> exit code. The larger number wins where processes hear different signals."""


class Stop(Callback):
    """Hears the signals from its construction on; must come first among the callbacks.

    `LongClip.training_step` makes what one process heard known to all, in a collective that it needs
    anyway, so all of them save after the same step and none waits for one that has left.

    Args:
        checkpoints: the callback whose `on_train_end` saves what is not saved yet.
    """

    def __init__(self, checkpoints: Callback) -> None:
        self.checkpoints = checkpoints
        self.owner = os.getpid()
        self.heard = 0
        self.stepping = self.leaving = False
        self._listen()

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._listen()  # Lightning has put in a handler of its own, which broadcasts in the middle of a step

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.stepping = True
        module.asked = self.heard

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if module.asked:
            name, code = signal.Signals(module.asked).name, CODES[module.asked]
            self.leaving = True
            atexit.register(_leave_together)
            self.checkpoints.on_train_end(trainer, module)
            log.info("%s: saved at step %d; resume=auto goes on from there", name, trainer.global_step)
            raise SystemExit(code)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.stepping = False

    def _listen(self) -> None:
        for signum in CODES:
            signal.signal(signum, self._hear)

    def _hear(self, signum: int, _: Any) -> None:
        if self.leaving:
            return
        self.heard = max(self.heard, signum)
        if not self.stepping or os.getpid() != self.owner:
            self.leaving = True
            raise SystemExit(CODES[signal.Signals(signum)])


def _leave_together() -> None:
    """The last thing a process does: srun sends SIGTERM to the others as soon as one has left with a code.

    Only an ignored signal stays harmless while the interpreter shuts down: it takes its own handlers out.
    """
    if dist.world() > 1:
        torch.distributed.barrier()  # nobody is still closing its loggers
    for signum in CODES:
        signal.signal(signum, signal.SIG_IGN)
