"""The training state that DeepSpeed holds in flat partitions, as whole tensors (see `states`)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from .. import dist
from .states import WEIGHTS, split


def gathered(strategy: DeepSpeedStrategy) -> AbstractContextManager[object]:
    """All weights whole on every process, and none of ZeRO 3's hooks, which serve a training step."""
    whole: AbstractContextManager[object] = deepspeed.zero.unwrap_model_for_generation(
        strategy.deepspeed_engine
    )
    return whole


class ZeroState:
    """ZeRO 1, 2 and 3; weights and their float32 copies are one and the same number here."""

    def __init__(self, module: torch.nn.Module, strategy: DeepSpeedStrategy) -> None:
        self.parameters: dict[str, Any] = dict(module.named_parameters())
        self.buffers = {n: x for n, x in module.state_dict().items() if n not in self.parameters}
        self.partitioned = strategy.zero_stage_3
        self.zero: Any = strategy.deepspeed_engine.optimizer
        self.base: torch.optim.Optimizer = self.zero.optimizer  # over flat partitions
        self._link()

    def shapes(self) -> dict[str, torch.Size]:
        whole = {n: p.ds_shape if self.partitioned else p.shape for n, p in self.parameters.items()}
        found = {f"{WEIGHTS}/{n}": shape for n, shape in whole.items()}
        found |= {f"{WEIGHTS}/{n}": x.shape for n, x in self.buffers.items()}
        for kind, value in next(iter(self.base.state.values()), {}).items():
            trained = (n for n, p in self.parameters.items() if p.requires_grad)
            found |= {f"{kind}/{n}": whole[n] if value.ndim else value.shape for n in trained}
        return found

    def make_room(self, names: Iterable[str]) -> None:
        kinds = {split(name)[0] for name in names}
        for flat in self._partitions():
            self.base.state[flat] = {
                kind: torch.zeros((), device=flat.device) if kind == "step" else torch.zeros_like(flat)
                for kind in sorted(kinds)
            }
        self._link()

    def get(self, name: str) -> Tensor:
        kind, own = split(name)
        if own in self.buffers:
            return self.buffers[own]
        parameter = self.parameters[own]
        if kind == WEIGHTS:
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.partitioned):
                return parameter.detach().clone()
        if kind == "step":
            return next(iter(self.base.state.values()))[kind]
        return safe_get_full_optimizer_state(parameter, kind)

    def set(self, name: str, value: Tensor) -> None:
        kind, own = split(name)
        if own in self.buffers:
            self.buffers[own].copy_(value)
        elif kind == "step":
            for flat in self._partitions():
                self.base.state[flat][kind].copy_(value)
        else:
            self._set(self.parameters[own], kind, value)

    @torch.no_grad()
    def _set(self, parameter: Any, kind: str, value: Tensor) -> None:
        if kind == WEIGHTS:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.partitioned):
                parameter.copy_(value)
        if not parameter.requires_grad:
            return
        if self.partitioned:
            share = self._share(parameter, value)
            if kind == WEIGHTS:
                safe_set_local_fp32_param(parameter, share)
            else:
                safe_set_local_optimizer_state(parameter, share, kind)
        elif kind == WEIGHTS:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _share(self, parameter: Any, value: Tensor) -> Tensor:
        """This process's equal part of a parameter under stage 3; zeros behind the end of the last."""
        size = parameter.ds_tensor.numel()
        padded = value.new_zeros(size * dist.world())
        padded[: value.numel()] = value.flatten()
        return padded[dist.rows(size)]

    def _link(self) -> None:
        """Parameters learn where their moments lie; DeepSpeed forgets all groups but the first."""
        if self.base.state and not self.partitioned:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _partitions(self) -> list[Tensor]:
        flats: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat
            if self.partitioned
            else self.zero.single_partition_of_fp32_groups
        )
        return flats
