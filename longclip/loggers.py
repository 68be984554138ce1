"""Curves of a run that may start many times: nothing of an earlier start is lost or counted twice."""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from . import runs
from .gallery import Gallery, Pointed, Way
from .heat import overlay


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
    """One Weights & Biases run through all starts: config, curves, galleries, and where the checkpoint lies.

    Its id is kept in the run directory: an id made of the run's name would continue the curve of
    another run that once had this name. Rows are numbered by the training's step: wandb's own count
    begins at 0 in every start that is off line. Weights are never uploaded: the artifact is a reference.
    """

    def __init__(self, run: str, **options: Any) -> None:
        super().__init__(save_dir=run, id=identity(Path(run)), **options)
        self.run = Path(run)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._log(metrics, step)

    @rank_zero_only
    def log_galleries(self, galleries: Sequence[Gallery], step: int) -> None:
        """Two tables for each benchmark: what it failed at, and where sentences point."""
        tables = {}
        for shown in galleries:
            tables[f"gallery/{shown.benchmark}"] = _table(_FAILURES, _failures(shown))
            tables[f"heat/{shown.benchmark}"] = _table(_MAPS, _maps(shown.pointed))
        with _staging(self.run / "wandb"):
            self._log(tables, step)

    def _log(self, row: Mapping[str, Any], step: int | None) -> None:
        """Lightning tells wandb to draw everything over this column, which stays 0 where it is left out."""
        self.experiment.log({**row, "trainer/global_step": step}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._experiment is not None:  # else the next job of a sweep would go on in this run
            # A signal to the whole job has ended wandb's service, too.
            with contextlib.suppress(ConnectionError):
                self._refer()
                self._experiment.finish(exit_code=int(status != "success"))
            self._experiment = None

    def _refer(self) -> None:
        """An artifact that says where the newest checkpoint lies and what it reached."""
        import wandb

        checkpoint = runs.newest_checkpoint(self.run)
        if checkpoint is not None:
            reached = dict(islice((runs.judgements(self.run) or [{}])[-1].items(), _MOST))
            artifact = wandb.Artifact(f"checkpoint-{identity(self.run)}", "model", metadata=reached)
            artifact.add_reference(checkpoint.resolve().as_uri(), checksum=False)
            self.experiment.log_artifact(artifact)


_MOST = 100  # values that wandb lets an artifact carry

# Columns of the two tables.
_FAILURES = (
    "asked by",
    "rank",
    "of",
    "key",
    "right image",
    "text",
    "came first",
    "image first",
    "text first",
)
_MAPS = ("key", "rank", "sentence", "cosine", "map")


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[None]:
    """wandb keeps the files of tables in the home directory, which another machine may lack: here instead."""
    chosen = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = chosen or str(folder.resolve())
    try:
        yield
    finally:
        if chosen is None:
            del os.environ["WANDB_DATA_DIR"]


def _table(columns: Sequence[str], rows: Iterator[list[Any]]) -> Any:
    import wandb

    shown = [[wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]
    return wandb.Table(columns=list(columns), data=shown)


def _failures(shown: Gallery) -> Iterator[list[Any]]:
    yield from _way("text", shown.t2i)
    yield from _way("image", shown.i2t)


def _way(asked_by: str, way: Way) -> Iterator[list[Any]]:
    for rank, key, picture, text, found_key, found_picture, found_text in way.failures:
        pictures = [_opened(data) for data in (picture, found_picture)]
        yield [asked_by, rank, way.items, key, pictures[0], text, found_key, pictures[1], found_text]


def _maps(pointed: Sequence[Pointed]) -> Iterator[list[Any]]:
    for one in pointed:
        picture = Image.open(io.BytesIO(one.picture)).convert("RGBA")
        for sentence, cosine, heat_YX in zip(one.sentences, one.similarity, one.heat_SYX, strict=True):
            laid = Image.open(io.BytesIO(overlay(heat_YX, picture.height, picture.width)))
            shown = Image.alpha_composite(picture, laid).convert("RGB")
            yield [one.key, one.rank, sentence, cosine, shown]


def _opened(data: bytes | None) -> Image.Image | None:
    return Image.open(io.BytesIO(data)) if data else None


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
