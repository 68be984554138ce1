"""Gradient norms of a LongClip's parts, however a strategy holds the gradients.

Each process squares what it holds and all of these squares add up to the squared norm: shares of a split
gradient by nature, copies of a whole one because each counts 1 / processes. So a caller who adds up numbers
of all processes anyway needs no collective for the norms.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .. import dist
from .zero import Zero

PARTS = ("image", "text", "scale", "terms")


def part(name: str) -> str:
    """Which part of a LongClip a parameter belongs to; "scale" is the temperature.

    >>> [part(name) for name in ("tower.backbone.visual.proj", "tower.backbone.logit_scale")]
    ['image', 'scale']
    """
    if name.startswith("terms."):
        return "terms"
    rest = name.removeprefix("tower.backbone.")
    if rest.startswith("visual."):
        return "image"
    return "scale" if rest in ("logit_scale", "logit_bias") else "text"


def squares(trainer: lightning.Trainer) -> Tensor:
    """[len(PARTS)] float32; summed over the processes: the squared norms of the averaged gradients.

    To be called between the backward pass and clipping (`on_before_optimizer_step`); waits for no device.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    split: dict[str, list[Tensor]] = {name: [] for name in PARTS}
    whole: dict[str, list[Tensor]] = {name: [] for name in PARTS}
    for name, parameter in module.named_parameters():
        held: Any = parameter.grad
        if isinstance(strategy, Zero):
            held = strategy.gradient(parameter)
        if held is None:
            continue
        shared = isinstance(held, DTensor)
        place = split if shared or isinstance(strategy, Zero) else whole
        place[part(name)].append(held.to_local() if shared else held)
    sums = [_square(split[name], module) + _square(whole[name], module) / dist.world() for name in PARTS]
    return torch.stack(sums)


def _square(gradients: list[Tensor], module: Any) -> Tensor:
    return torch.nn.utils.get_total_norm(gradients).square().to(module.device)
