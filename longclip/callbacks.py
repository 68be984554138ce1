"""What happens around the steps: judging, telemetry, progress. No arithmetic on the loss."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar

from . import dist, ema, runs
from .curriculum import Curriculum
from .evaluate import Evaluator, Findings, examine, flat
from .gallery import Gallery, galleries
from .loggers import Wandb
from .strategies.states import averaged, whole_weights
from .towers.image import check_sizes, patch_dropout
from .types import Batch

log = logging.getLogger(__name__)


class Judge(Callback):
    """Judge before the first update, every so many samples, and at the end; write `metrics.json`.

    Args:
        run: the run directory.
        benchmarks: name -> evaluator.
        every: samples between judgements; 0: none.
        start: judge before the first update, too; runs from one start need that once.
        weights: which to judge, "raw" or "ema"; None: the running averages where the run keeps them.
        gallery: failures each way and heat maps of every benchmark, for loggers that show pictures; 0: none.
    """

    def __init__(
        self,
        run: str,
        benchmarks: Mapping[str, Evaluator],
        every: int = 0,
        start: bool = True,
        weights: str | None = None,
        gallery: int = 0,
    ) -> None:
        self.run, self.benchmarks, self.every, self.weights = Path(run), benchmarks, every, weights
        self.gallery, self.start = gallery, start
        self.judged_at = -1

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.averaged = ema.chosen(self.weights, ema.kept_by(trainer.optimizers[0]), "this run")

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.judged_at = module.samples_seen
        if module.samples_seen == 0 and self.start:
            self.judged_at = -1
            self._judge(trainer, module)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if self.every and module.samples_seen // self.every > self.judged_at // self.every:
            self._judge(trainer, module)

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self._judge(trainer, module)

    def _judge(self, trainer: lightning.Trainer, module: Any) -> None:
        if self.judged_at == module.samples_seen and (self.run / "metrics.json").exists():
            return
        started = time.monotonic()
        with averaged(trainer) if self.averaged else nullcontext(), whole_weights(trainer):
            findings = examine(module.tower, trainer.datamodule, self.benchmarks)  # type: ignore[attr-defined]
            shown = self._galleries(trainer, module.tower, findings)
        self.judged_at, found = module.samples_seen, flat(findings)
        if trainer.is_global_zero and found:
            runs.record(self.run, module.samples_seen, found)
            for logger in trainer.loggers:
                logger.log_metrics(found, step=trainer.global_step)
            for album in _albums(trainer):
                album.log_galleries(shown, step=trainer.global_step)
            headline = ", ".join(headlines(found)[:3])
            log.info(
                "judged at %s samples in %.1f s: %s",
                f"{module.samples_seen:,}",
                time.monotonic() - started,
                headline,
            )

    def _galleries(self, trainer: lightning.Trainer, tower: Any, found: dict[str, Findings]) -> list[Gallery]:
        """Made by every process, since sharded weights are gathered by all of them."""
        return galleries(tower, found, self.gallery) if self.gallery and _albums(trainer) else []


def _albums(trainer: lightning.Trainer) -> list[Wandb]:
    """The loggers that show pictures."""
    return [logger for logger in trainer.loggers if isinstance(logger, Wandb)]


def headlines(found: dict[str, float]) -> list[str]:
    """R@1 of every view, both ways, as short words."""
    views = [name.removesuffix("/i2t_r1") for name in found if name.endswith("/i2t_r1")]
    return [f"{v} R@1 {found[f'{v}/i2t_r1']:.1f} / {found[f'{v}/t2i_r1']:.1f}" for v in views]


class Stages(Callback):
    """The tower's part in a curriculum: refuses what the image tower cannot do, and sets the patch dropout.

    The data makes the batches of the same stage on its own (`curriculum.Curriculum`).
    """

    def __init__(self, curriculum: Curriculum) -> None:
        self.curriculum = curriculum

    def on_fit_start(self, trainer: lightning.Trainer, module: Any) -> None:
        visual, sizes = module.tower.backbone.visual, self.curriculum.sizes
        if sizes:
            check_sizes(visual, sizes)
        self.curriculum.check_model(module.tower.preprocess_cfg["size"], module.tower.context_length)
        if self.curriculum.patch_dropout:
            self.own = patch_dropout(visual).prob

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if self.curriculum.patch_dropout:
            share = self.curriculum.at(module.samples_seen).patch_dropout
            patch_dropout(module.tower.backbone.visual).prob = self.own if share is None else share


class Skips(Callback):
    """Damaged samples of all processes: logged, summed up at the end, a reason to stop if they are many."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            ledger = trainer.datamodule.ledger
            ledger.judge()
            module.log_dict(ledger.measures())

    def on_train_end(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero:
            log.info("data: %s", trainer.datamodule.ledger.summary())


class Telemetry(Callback):
    """Speed, waiting for data, learning rate, and what nobody shows: tokens, truncation, packing.

    Must come last among the callbacks, so that judging and saving do not count as waiting for data.
    """

    def __init__(self) -> None:
        self.every = 1
        self.ready = time.perf_counter()
        self.seconds = self.waited = 0.0
        self.images = 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.every = trainer.log_every_n_steps
        self.ready = time.perf_counter()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.begun = time.perf_counter()
        self.waited += self.begun - self.ready

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.images += len(batch.keys) * dist.world()
        self.seconds += time.perf_counter() - self.begun
        if trainer.global_step % self.every == 0:
            total = self.seconds + self.waited
            module.log_dict(
                {
                    "samples_per_second": self.images / total,
                    "data_time": self.waited / self.every,
                    "batch_time": total / self.every,
                    "lr": module.optim.lr_at(module.samples_seen),
                    "samples_seen": float(module.samples_seen),
                    **_source_counts(trainer, module),
                    **token_counts(batch),
                }
            )
            self.seconds, self.waited, self.images = 0.0, 0.0, 0
        self.ready = time.perf_counter()


def _source_counts(trainer: Any, module: Any) -> dict[str, float]:
    """How many samples of each source have been shown since the run began."""
    shown = trainer.datamodule.shown(module.samples_seen)
    return {f"data/{name}/samples": float(count) for name, count in shown.items()}


def token_counts(batch: Batch) -> dict[str, float]:
    """Tokens per image, share of captions and tokens cut, and how full a padded batch would have been."""
    lengths_BK, dropped_BK = batch.lengths_BK, batch.dropped_BK
    captions, tokens = int((lengths_BK > 0).sum()), int(lengths_BK.sum())
    given = max(tokens + batch.withheld + int(dropped_BK.sum()), 1)
    return {
        "tokens_per_sample": tokens / len(batch.keys),
        "truncated_captions": float((dropped_BK > 0).sum()) / max(captions, 1),
        "truncated_tokens": int(dropped_BK.sum()) / given,
        "withheld_tokens": batch.withheld / given,
        "packing_fill": tokens / max(captions * batch.longest, 1),
    }


class PlainProgress(ProgressBar):
    """One line every `every` steps, with the time left: for logs, where a bar is garbage."""

    def __init__(self, every: int = 50) -> None:
        super().__init__()
        self.every, self.silent = every, False

    def disable(self) -> None:
        """Lightning's word to every process but the first."""
        self.silent = True

    def enable(self) -> None:
        self.silent = False

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.started, self.first = time.monotonic(), module.samples_seen

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if self.silent or (trainer.global_step % self.every and trainer.global_step != trainer.max_steps):
            return
        seen, total = module.samples_seen, module.optim.samples
        rate = (seen - self.first) / max(time.monotonic() - self.started, 1e-9)
        left = timedelta(seconds=round(max(total - seen, 0) / max(rate, 1e-9)))
        seen_metrics = trainer.callback_metrics
        loss = f"loss {float(seen_metrics['train/loss']):.3f}  " if "train/loss" in seen_metrics else ""
        log.info(
            "step %d/%d  samples %s (%.0f %%)  %s%.0f samples/s  ETA %s",
            trainer.global_step,
            trainer.max_steps,
            f"{seen:,}",
            100 * seen / total,
            loss,
            rate,
            left,
        )


class Bar(RichProgressBar):
    """Lightning's bar over the whole run: an epoch of ours has no end that Lightning could name."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"


def progress() -> Callback:
    """A bar with the time left on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        return Bar()
    return PlainProgress()
