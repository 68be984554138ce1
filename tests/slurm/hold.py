"""A logger that stops the clock: at a chosen step it says so by a file, and waits until a signal was heard.

A test then knows at which step a signal falls, however fast or slow the machine is.
"""

import signal
import time
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

SECONDS = 120


class Hold(Logger):
    name, version = "hold", ""

    def __init__(self, run, at):
        super().__init__()
        self.run, self.at = Path(run), at

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        mark = self.run / f"held-{step}"
        if step not in self.at or mark.exists():
            return
        mark.touch()
        deadline = time.monotonic() + SECONDS
        while not signal.getsignal(signal.SIGUSR1).__self__.heard and time.monotonic() < deadline:
            time.sleep(0.05)

    def log_hyperparams(self, *_, **__):
        pass
