"""How processes share the work: Lightning's strategies, made for `conf/trainer/*.yaml`.

Every one computes the same numbers: float32 weights, autocast where the trainer says bf16-mixed, gradients
averaged in float32 and clipped by their global norm. They differ in what a process holds of a step:

    ddp       everything
    ZeRO 1    all weights and gradients, its share of the moments
    ZeRO 2    all weights, its share of gradients and moments
    ZeRO 3    its share of everything, and one block's weights while that block computes
    fsdp2     the same, by torch alone

`timeout_minutes` bounds how long a collective waits for a process that has died.
"""

from __future__ import annotations

import warnings
from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy


def ddp(timeout_minutes: float) -> DDPStrategy:
    """The whole model on every process.

    It has to look for parameters without gradient: a process none of whose images has a caption does not
    run its text tower, and a recipe whose terms have temperatures of their own does not use the model's.
    """
    return DDPStrategy(
        timeout=timedelta(minutes=timeout_minutes), find_unused_parameters=True, gradient_as_bucket_view=True
    )


def fsdp2(timeout_minutes: float) -> ModelParallelStrategy:
    """FSDP2 over all processes; `sharding.prepare` says which modules are split on their own."""
    # Embeddings are views, and nothing works in place on them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    return ModelParallelStrategy(timeout=timedelta(minutes=timeout_minutes))
