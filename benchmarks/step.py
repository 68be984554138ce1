"""The whole training step beside open_clip's own training loop, on the same images, captions and model.

Ours is what `train.py` runs: LongClip in Lightning's Trainer with a logger and telemetry, from batches that
are ready. Theirs is `open_clip_train.train.train_one_epoch` with open_clip's loss and the optimizer of its
`main`, on captions as open_clip lays them out. The two take turns of a few steps within one fit.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from longclip.callbacks import Telemetry
from longclip.objectives import Contrastive
from longclip.optim import AdamW
from longclip.tokens import Tokenizer
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import Backbone
from longclip.training import LongClip
from longclip.types import Batch

from . import open_clip_loop, padded
from .lengths import LONG, SHORT, SOURCES
from .measures import Job, Row, fewer, seconds
from .open_clip_loop import Slots, Turn
from .padded import Captions

OPTIM: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
CLIP_NORM = 1.0
LOG_EVERY = 20


class Work(NamedTuple):
    """Some steps on one batch."""

    backbone: Backbone
    captions: Captions
    steps: int  # of a turn
    turns: int  # the fastest counts


def rows(quick: bool, folder: Path) -> list[Row]:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    turns = 2 if quick else 4
    found = []
    for name, draw in SOURCES.items():
        tag = "" if name == "synthetic" else f".{name}"
        captions = padded.captions(draw(2, 0))
        work = Work(_backbone("ViT-B-16", LONG, 1 if quick else None), captions, 1, turns)
        found += _long(work, folder, tag)
    full, real = np.full((32, 1), SHORT), np.random.default_rng(0).normal(16, 6, (32, 1)).clip(5, SHORT)
    small = _backbone("ViT-scenes", SHORT, 1 if quick else None)
    found.append(_plain("P6.small", Work(small, _pairs(full), 5, turns), folder))
    found.append(_plain("P6.small.mean16", Work(small, _pairs(real.astype(np.int64)), 5, turns), folder))
    if not quick:
        large = _backbone("ViT-B-16", SHORT)
        found.append(_plain("P6.b16", Work(large, _pairs(full[:4]), 1, turns), folder))
    return found


def _long(work: Work, folder: Path, tag: str) -> list[Row]:
    """P5: sub-captions and a long caption an image."""
    ways = {"pad248": padded.at_full_context, "pad77+248": padded.at_two_lengths}
    took = _side_by_side(work, ways, folder)
    goals, limits = {"pad248": 3.2, "pad77+248": 1.6}, {"pad248": "4.01", "pad77+248": "1.90"}
    images = len(work.captions.lengths_BK)
    return [
        fewer(
            f"P5.{way}{tag}",
            f"ViT-B/16 step of {images} images, CPU s, against {way}",
            took["ours"],
            took[way],
            goals[way],
            None if tag else limits[way],
        )
        for way in ways
    ]


def _plain(id: str, work: Work, folder: Path) -> Row:
    """P6: one caption an image at open_clip's own context."""
    took = _side_by_side(work, {"open_clip": padded.at_full_context}, folder)
    lengths = work.captions.lengths_BK
    measure = f"{id[3:]} step of {len(lengths)} pairs of {lengths.float().mean():.0f} tokens, CPU s"
    return fewer(id, measure, took["ours"], took["open_clip"], 1 / 1.03)


def _side_by_side(
    work: Work, ways: Mapping[str, Callable[[Any, Captions], Tensor]], folder: Path
) -> dict[str, float]:
    """Seconds a step: ours, and open_clip's model trained with each way to encode captions."""
    torch.manual_seed(0)
    images = len(work.captions.lengths_BK)
    side = work.backbone.model_cfg["vision_cfg"]["image_size"]
    pixels_BCHW = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)
    tower = DualTower(work.backbone)
    theirs = copy.deepcopy(tower.backbone)
    optimizer = open_clip_loop.optimizer(theirs, OPTIM)
    pixels = tower.normalise(pixels_BCHW)
    jobs = {
        way: Turn(Slots(theirs, encode, work.captions), optimizer, pixels, work.steps, CLIP_NORM)
        for way, encode in ways.items()
    }
    turns = _Turns(work, jobs)
    _fit(tower, pixels_BCHW, work, turns, folder)
    return {name: took / work.steps for name, took in turns.best.items()}


def _fit(tower: DualTower, pixels_BCHW: Tensor, work: Work, turns: _Turns, folder: Path) -> None:
    lengths_BK = work.captions.lengths_BK
    images, slots = lengths_BK.shape
    groups = (
        {"sub": slice(0, slots - 1), "long": slice(slots - 1, slots)} if slots > 1 else {"long": slice(0, 1)}
    )
    batch = Batch(
        keys=[str(i) for i in range(images)],
        pixels_BCHW=pixels_BCHW,
        tokens_T=work.captions.tokens_T,
        lengths_BK=lengths_BK,
        dropped_BK=torch.zeros_like(lengths_BK),
        longest=work.captions.longest,
    )
    steps = work.steps * work.turns
    terms = {name: Contrastive(name) for name in groups}
    optim = AdamW(warmup=0, samples=steps * images, **OPTIM)
    module = LongClip(tower, terms, groups, optim, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and on cluster launchers
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            max_steps=steps,
            gradient_clip_val=CLIP_NORM,
            log_every_n_steps=LOG_EVERY,
            logger=CSVLogger(folder),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[Telemetry(), turns],
            default_root_dir=folder,
        )
        trainer.fit(module, _Ready(batch, steps))


class _Ready(lightning.LightningDataModule):
    """The same batch over and over."""

    def __init__(self, batch: Batch, steps: int) -> None:
        super().__init__()
        self.batch, self.steps = batch, steps

    def train_dataloader(self) -> DataLoader[Any]:
        steps: Any = [self.batch] * self.steps  # a dataset is what has a length and items
        return DataLoader(steps, batch_size=None, collate_fn=lambda batch: batch)

    def resume(self, *_: Any) -> int:
        return self.steps

    def shown(self, samples: int) -> dict[str, int]:
        return {}


class _Turns(lightning.Callback):
    """Stops the clock after every turn of ours, and gives open_clip's loop its own."""

    def __init__(self, work: Work, jobs: Mapping[str, Job]) -> None:
        self.steps, self.jobs, self.best = work.steps, jobs, dict.fromkeys(["ours", *jobs], float("inf"))

    def on_train_start(self, *_: Any) -> None:
        self.started = time.process_time()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step % self.steps:
            return
        took = {"ours": time.process_time() - self.started, **seconds(self.jobs, 1)}
        self.best = {name: min(best, took[name]) for name, best in self.best.items()}
        self.started = time.process_time()


def _pairs(lengths_B1: np.ndarray) -> Captions:
    return padded.captions(lengths_B1, long=SHORT)


def _backbone(name: str, context: int, layers: int | None = None) -> Backbone:
    config = padded.config(name, layers, context)
    preprocess = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    torch.manual_seed(0)
    return Backbone(CLIP(**config), config, preprocess, Tokenizer(SimpleTokenizer(), context))
