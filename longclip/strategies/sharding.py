"""A LongClip as strategies can split it: which modules FSDP2 shards on their own (`fully_shard`).

In: a tower and its terms. Out: the same modules, in place; under FSDP2 every parameter is a DTensor.

A unit's parameters are gathered when its forward is called, so a unit is something whose forward is
called: each block of the image tower but the last (freed after its forward, gathered again for its backward),
each term that has parameters, and the DualTower for all the rest. The packed text tower is functions
over open_clip's parameters, no forward of its blocks runs; it belongs to that rest and stays gathered from
the step's forward to its backward. That costs 4 bytes a text parameter (ViT-L/14: 0.5 GB) while gradients,
moments and the stored weights are split like everything else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method


def prepare(tower: Any, terms: Iterable[nn.Module], mesh: DeviceMesh | None) -> None:
    """Make a DualTower and its terms fit for any strategy, in place; split them where there is a mesh.

    Computation stays as it was: float32 weights, autocast where the trainer says so, gradients averaged.
    """
    units = [unit for unit in (tower, *terms) if any(True for _ in unit.parameters())]
    for unit in units:
        _widen_scalars(unit)
    if mesh is None or isinstance(tower, FSDPModule):
        return
    for unit in (*image_blocks(tower.backbone.visual), *units):
        fully_shard(unit)
    register_fsdp_forward_method(tower, "hold")


def outside_blocks(tower: Any, terms: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of no block of the image tower: those that are gathered for a whole step."""
    blocks = {parameter for block in image_blocks(tower.backbone.visual) for parameter in block.parameters()}
    return [p for unit in (tower, *terms) for p in unit.parameters() if p not in blocks]


def image_blocks(visual: nn.Module) -> list[nn.Module]:
    """The longest row of modules in an image tower: the blocks of a transformer, of open_clip's or timm's.

    Less the last one, of which `towers.pooled` calls the parts and not the forward.
    """
    rows = [list(m) for m in visual.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    return max(rows, key=len, default=[])[:-1]


def _widen_scalars(unit: nn.Module) -> None:
    """Neither FSDP2 nor DeepSpeed takes a parameter without axes; [1] broadcasts the same."""
    for module in unit.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(parameter.detach()[None], parameter.requires_grad))
