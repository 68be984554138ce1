"""Two trainees, the same model and batch: longclip's own step, and open_clip's model, loss and AdamW.

A step is forward under bf16 autocast, backward, clipping, the optimizer's update. Batches lie on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from longclip.objectives import Contrastive
from longclip.optim import AdamW
from longclip.tokens import Tokenizer
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import Backbone
from longclip.training import LongClip
from longclip.types import Batch

from . import lengths, padded
from .device import Device
from .padded import Captions

SLOTS = {"sub": slice(0, lengths.SUBS), "long": slice(lengths.SUBS, lengths.SUBS + 1)}
PREPROCESS = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
CLIP_NORM = 1.0


class Given(NamedTuple):
    """The same images and captions for both."""

    batch: Batch
    captions: Captions
    pixels_BCHW: Tensor  # normalised, as open_clip's loader hands them over


def given(device: Device, config: dict[str, Any], images: int, seed: int = 0) -> Given:
    lengths_BK = lengths.synthetic(images, seed)
    captions = padded.captions(lengths_BK)
    side = config["vision_cfg"]["image_size"]
    pixels_BCHW = torch.randint(256, (images, 3, side, side), dtype=torch.uint8).to(device.at)
    batch = Batch(
        keys=[str(i) for i in range(images)],
        pixels_BCHW=pixels_BCHW,
        tokens_T=captions.tokens_T.to(device.at),
        lengths_BK=captions.lengths_BK,
        dropped_BK=torch.zeros_like(captions.lengths_BK),
        longest=int(lengths_BK.max()),
    )
    moved = Captions(*(x.to(device.at) for x in captions))
    return Given(batch, moved, pixels_BCHW.float() / 127.5 - 1)


class Ours:
    """LongClip with InfoNCE for the long captions and for every sub-caption."""

    def __init__(self, device: Device, config: dict[str, Any], compile: bool = False) -> None:
        tokenizer = Tokenizer(SimpleTokenizer(), lengths.LONG)
        tower = DualTower(Backbone(CLIP(**config), config, PREPROCESS, tokenizer), compile=compile)
        optim = AdamW(lr=1e-4, warmup=0, samples=10**9)
        self.device = device
        self.module = LongClip(tower, {name: Contrastive(name) for name in SLOTS}, SLOTS, optim, seed=0)
        self.module.to(device.at).log_every = 10**9  # what a trainer would set: never
        self.optimizer = optim.build(self.module)

    def step(self, batch: Batch) -> None:
        with self.device.autocast():
            loss = self.module.training_step(batch, 0)
        _update(loss, self.module, self.optimizer)


class Theirs:
    """open_clip's model, its captions laid out as `encode` says, its loss for each slot."""

    def __init__(
        self,
        device: Device,
        config: dict[str, Any],
        encode: Callable[[Any, Captions], Tensor],
        compile: bool = False,
    ) -> None:
        self.device, self.encode, self.loss = device, encode, ClipLoss(cache_labels=True)
        self.model = CLIP(**config).to(device.at)
        if compile:
            self.model.visual.compile()
            self.model.transformer.compile()
        groups = _open_clips_groups(self.model)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6)

    def step(self, given: Given) -> None:
        with self.device.autocast():
            image_BE = self.model.encode_image(given.pixels_BCHW, normalize=True)
            text_SE = F.normalize(self.encode(self.model, given.captions), dim=-1)
            text_BKE = text_SE.view(len(image_BE), -1, text_SE.shape[-1])  # no caption is absent
            scale = self.model.logit_scale.exp()
            *subs, long = [self.loss(image_BE, text_BE, scale) for text_BE in text_BKE.unbind(1)]
        _update(torch.stack(subs).mean() + long, self.model, self.optimizer)


def _update(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()


def _open_clips_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As its training script makes them."""
    exempt = [p for name, p in model.named_parameters() if p.ndim < 2 or "logit_scale" in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim < 2 or "logit_scale" in name)]
    return [{"params": exempt, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]


def real_tokens(given: Given) -> np.ndarray:
    """The lengths of its captions, for counting work."""
    return given.batch.lengths_BK.numpy().astype(np.int64)
