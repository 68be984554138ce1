"""A training state as whole tensors under plain names, whatever engine holds it.

    weights/NAME     what the module's state dict calls NAME
    exp_avg/NAME     what the optimizer keeps for the parameter NAME; so exp_avg_sq, step, ...
    ema/NAME         its running average, where one is kept (`longclip.ema`)

Saved under these names, a state goes on on any number of processes and under any strategy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import ema

WEIGHTS = "weights"


class State(Protocol):
    """All processes call `get` and `set` for the same names in the same order."""

    def shapes(self) -> dict[str, torch.Size]:
        """Every tensor of the state, whole; moments only once there are some."""

    def make_room(self, names: Iterable[str]) -> None:
        """Let the optimizer hold these moments, before its first step."""

    def get(self, name: str) -> Tensor:
        """The whole tensor, on every process."""

    def set(self, name: str, value: Tensor) -> None:
        """The same whole tensor, given on every process."""


def state_of(trainer: lightning.Trainer) -> State:
    """The state of a trainer whose strategy is set up."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        from .zero_state import ZeroState

        return ZeroState(trainer.lightning_module, trainer.strategy)
    return TorchState(trainer.lightning_module, trainer.optimizers[0])


@contextmanager
def whole_weights(trainer: lightning.Trainer) -> Iterator[None]:
    """In here parts of the towers can be called outside a training step, which is what strategies gather for.

    FSDP2 would keep what it gathers for the next step, which must not see running averages (`averaged`).
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        from .zero_state import gathered

        with gathered(strategy):
            yield
    elif isinstance(module.tower, FSDPModule):
        tower = cast(Any, module.tower)
        tower.hold()
        try:
            yield
        finally:
            tower.reshard()
    else:
        yield


@contextmanager
def averaged(trainer: lightning.Trainer) -> Iterator[None]:
    """In here the weights are their running averages, where there are some.

    Averages and weights change places and back again, one tensor after the other: exact, and no second
    model in memory. Not undone after an error, as no process may wait for others that have failed.
    """
    state = state_of(trainer)
    names = [split(name)[1] for name in state.shapes() if split(name)[0] == ema.KIND]
    _exchange(state, names)
    yield
    _exchange(state, names)


def _exchange(state: State, names: Iterable[str]) -> None:
    for name in names:
        weights, average = state.get(f"{WEIGHTS}/{name}").clone(), state.get(f"{ema.KIND}/{name}")
        state.set(f"{WEIGHTS}/{name}", average)
        state.set(f"{ema.KIND}/{name}", weights)


class TorchState:
    """One process, DDP and FSDP2: plain tensors or DTensors."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.weights: dict[str, Tensor] = module.state_dict()
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = optimizer

    def shapes(self) -> dict[str, torch.Size]:
        found = {f"{WEIGHTS}/{name}": tensor.shape for name, tensor in self.weights.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            found |= {f"{kind}/{name}": value.shape for kind, value in moments.items()}
        return found

    def make_room(self, names: Iterable[str]) -> None:
        fused = self.optimizer.defaults["fused"]
        for full_name in names:
            kind, name = split(full_name)
            parameter = self.parameters[name]
            device = parameter.device if fused else "cpu"
            self.optimizer.state[parameter][kind] = (
                torch.zeros((), device=device) if kind == "step" else torch.zeros_like(parameter)
            )

    def get(self, name: str) -> Tensor:
        tensor = self._held(name)
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    @torch.no_grad()
    def set(self, name: str, value: Tensor) -> None:
        tensor = self._held(name)
        if isinstance(tensor, DTensor):  # each process cuts its own share out of the value it has
            place = tensor.device_mesh, tensor.placements
            value = distribute_tensor(value.to(tensor.device), *place, src_data_rank=None).to_local()
            tensor = tensor.to_local()
        tensor.copy_(value)

    def _held(self, full_name: str) -> Tensor:
        kind, name = split(full_name)
        if kind == WEIGHTS:
            return self.weights[name]
        held: Any = self.optimizer.state[self.parameters[name]][kind]
        return held


def split(full_name: str) -> tuple[str, str]:
    """ "exp_avg/tower.backbone.x" -> ("exp_avg", "tower.backbone.x")."""
    kind, _, name = full_name.partition("/")
    return kind, name
