"""AdamW with the right exemptions, and a schedule counted in samples.

In: a module. Out: an optimizer, and for any number of samples seen the factor on its learning rate.
The schedule is a pure function, so there is no scheduler state to save or to get out of step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import ema
from .types import UserError

LN_100 = math.log(100)
"""CLIP's ceiling on the log of the temperature factor (Radford et al. 2021, section 2.5)."""

NO_DECAY = ("positional_embedding", "class_embedding", "logit_scale", "logit_bias")


@dataclass(frozen=True)
class AdamW:
    """AdamW, linear warm-up, cosine to `floor` of the peak.

    Args:
        lr: peak learning rate.
        betas, eps, weight_decay: as in torch. Norms, biases, positions and temperatures never decay.
        warmup: samples over which the rate rises linearly from 0.
        samples: samples of the whole run; the cosine ends there.
        floor: where the cosine ends, as a share of the peak.
        ema: half-life, in samples, of a running average of the weights (`longclip.ema`); None keeps none.
    """

    lr: float
    warmup: int
    samples: int
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    floor: float = 0.0
    ema: int | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(
                f"optim.lr is {self.lr}; it must be positive (YAML reads 1e-3, not '1e-3', as a number)"
            )
        if not 0 <= self.warmup <= self.samples:
            raise UserError(
                f"optim.warmup is {self.warmup:,} samples, but the run has only {self.samples:,}; "
                "both count samples: lower optim.warmup or raise samples"
            )
        if self.ema is not None and not self.ema > 0:
            raise UserError(
                f"optim.ema is {self.ema}; it is a half-life in samples, 1 or more (null: no running average)"
            )

    def build(self, module: nn.Module) -> Optimizer:
        """The optimizer over everything in `module` that is trainable."""
        groups = parameter_groups(module, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        # Fused AdamW offers to unscale float16 gradients itself, and Lightning then refuses to clip them.
        # With the offer withdrawn the scaler unscales first, as for every other optimizer.
        optimizer._step_supports_amp_scaling = False
        if self.ema:
            ema.attach(optimizer)
        return optimizer

    def settings(self, samples_seen: int, batch_size: int) -> dict[str, float]:
        """What the optimizer's groups are told before the step that begins after this many samples."""
        settings = {"lr": self.lr_at(samples_seen)}
        if self.ema:
            settings[ema.KIND] = ema.decay(self.ema, samples_seen, batch_size)
        return settings

    def lr_at(self, samples_seen: int) -> float:
        """The learning rate for the step that begins after this many samples."""
        return self.lr * schedule(samples_seen, self.warmup, self.samples, self.floor)


def schedule(seen: int, warmup: int, total: int, floor: float = 0.0) -> float:
    """Linear warm-up from 0, then cosine from 1 to `floor`; constant at `floor` after `total`.

    >>> [round(schedule(s, 10, 30), 2) for s in (0, 5, 10, 20, 30)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if seen < warmup:
        return seen / warmup
    progress = min((seen - warmup) / max(total - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; vectors, positions and temperatures do not."""
    decay: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_exempt = parameter.ndim < 2 or any(word in name for word in NO_DECAY)
        (exempt if is_exempt else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def clamp_temperatures(module: nn.Module) -> None:
    """Keep every `logit_scale` of the model and its terms in [0, ln 100], in place."""
    with torch.no_grad():
        for part in module.modules():  # named_parameters() takes three times as long, at every step
            scale = part._parameters.get("logit_scale")
            if scale is not None:
                scale.clamp_(0, LN_100)
