"""Curves of a run that may start many times: nothing of an earlier start is lost or counted twice."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only


def csv(run: str) -> CSVLogger:
    """`csv/metrics.csv` of this start; those of earlier ones lie in `csv.1`, `csv.2`, ...

    Lightning's logger deletes the file that it finds.
    """
    folder = Path(run) / "csv"
    if folder.exists() and leader():
        starts = len(list(Path(run).glob("csv.*")))
        folder.rename(f"{folder}.{starts + 1}")
    return CSVLogger(save_dir=run, name=folder.name, version="")


class Wandb(WandbLogger):
    """One Weights & Biases run through all starts.

    Its id is kept in the run directory: an id made of the run's name would continue the curve of
    another run that once had this name. Rows are numbered by the training's step: wandb's own count
    begins at 0 in every start that is off line.
    """

    def __init__(self, run: str, **options: Any) -> None:
        super().__init__(save_dir=run, id=identity(Path(run)), **options)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._experiment is not None:  # else the next job of a sweep would go on in this run
            # A signal to the whole job has ended wandb's service, too.
            with contextlib.suppress(ConnectionError):
                self._experiment.finish(exit_code=int(status != "success"))
            self._experiment = None


def identity(run: Path) -> str:
    """The run's id, made up at its first start; "" on processes that come before the first one has."""
    path = run / "wandb_id"
    if not path.exists() and leader():
        run.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text() if path.exists() else ""


def leader() -> bool:
    """Whether this is process 0, known before torch.distributed is."""
    return getattr(rank_zero_only, "rank", 0) == 0
