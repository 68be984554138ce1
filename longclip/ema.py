"""A running average of the weights, kept by the optimizer as one more kind of state beside its moments.

In: an optimizer, a half-life in samples. Out: `optimizer.state[parameter]["ema"]`, up to date after every
step. There every strategy splits, saves and restores it as it does the moments (`strategies.states`), at
the price of one of them: 4 bytes a trained parameter. Lightning's EMAWeightAveraging holds a whole second
model instead, which FSDP2 and ZeRO 3 exist to avoid, and it counts steps.

What does not train (frozen rows, buffers) has no average: it is what it is.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .types import UserError

KIND = "ema"

RAMP = 0.05
"""At the start the half-life is this share of the samples seen: the first weights are soon forgotten."""

CHOICES = ("raw", KIND)


def attach(optimizer: Optimizer) -> None:
    """Let the optimizer keep averages; `group["ema"]` of its parameter groups is the decay of a step."""
    for group in optimizer.param_groups:
        group[KIND] = 0.0
    optimizer.register_step_post_hook(_follow)


def kept_by(optimizer: Optimizer) -> bool:
    """Whether `attach` was called for it, or for what DeepSpeed wraps in it."""
    return KIND in optimizer.param_groups[0]


def decay(halflife: int, seen: int, batch: int) -> float:
    """How much of an average stays in a step of `batch` samples after `seen`: a half in `halflife` samples.

    Karras et al., "Elucidating the design space of diffusion-based generative models" (2022), whose training
    loop counts it in images and lets it grow with them, too.

    >>> [round(decay(1000, seen, 100), 3) for seen in (0, 2000, 20_000, 200_000)]
    [0.0, 0.5, 0.933, 0.933]
    """
    reach = min(halflife, RAMP * seen)
    return 0.5 ** (batch / reach) if reach else 0.0


def chosen(weights: str | None, kept: bool, where: str) -> bool:
    """Whether the averages are meant: `weights` is "raw", "ema", or None for averages where there are some.

    Raises UserError for another word, and where averages are asked for and `where` has none.
    """
    if weights not in (None, *CHOICES):
        raise UserError(f"weights={weights} is not known: choose {' or '.join(CHOICES)}, or leave it out")
    if weights == KIND and not kept:
        raise UserError(
            f"weights=ema, but {where} keeps no running average of its weights: leave weights out, or "
            "train with optim.ema=HALF_LIFE_IN_SAMPLES"
        )
    return kept and weights != "raw"


def _follow(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        # A parameter that no step has moved has no state yet, and must not get one before its moments.
        moved = [parameter for parameter in group["params"] if optimizer.state.get(parameter)]
        for parameter in moved:
            if KIND not in optimizer.state[parameter]:
                optimizer.state[parameter][KIND] = parameter.detach().clone()
        if moved:
            averages = [optimizer.state[parameter][KIND] for parameter in moved]
            get_ema_multi_avg_fn(group[KIND])(averages, moved, None)
