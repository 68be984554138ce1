"""Experts: several MLPs in the place of one, of which every token asks a few.

In: a model of open_clip's, and others that differ from it in the MLPs of their blocks alone (recipe=mcl).
Out: the first, in place, with in every block of both towers (Zhang et al. 2024, arXiv 2409.19291)

    p = softmax(W x),   y = sum over the k largest p_n of  p_n / (sum of these k)  MLP_n(x),

the router W [N, D] being new. Without others the experts are copies of the block's own MLP, told apart by
training (sparse upcycling, Komatsuzaki et al. 2022, arXiv 2212.05055); until then the model is what it was.
open_clip has no such blocks: checkpoints hold them, exports cannot.

Legend, beside `longclip`'s: T tokens, N experts, k those asked by a token, X = k T, A blocks of both towers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..types import UserError
from . import fitting, formats, sources
from .merging import merged_state_dict

_TOP = ".mlp.top"
_OWN = ("logit_scale", "logit_bias")  # what may differ between models beside MLPs


class Experts(NamedTuple):
    """What stands in the place of an MLP, where a term reads the routing.

    `models`: folders or files of weights, each an expert beside the model's own; finished, only routers
    learn. `copies`: without them, so many of the model's own, which learn as the MLP would have. `top`:
    experts that a token asks.
    """

    models: Sequence[str] = ()
    copies: int = 4
    top: int = 2


class Routed(nn.Module):
    """Experts in the place of a block's MLP.

    Attributes:
        heard: what `overheard` wants to know.
    """

    top: Tensor  # a buffer, so that a checkpoint can be read without its config

    def __init__(self, mlps: Sequence[nn.Module], width: int, top: int, like: Tensor) -> None:
        super().__init__()
        self.experts = nn.ModuleList(mlps)
        self.router = nn.Linear(width, len(mlps), bias=False, device=like.device, dtype=like.dtype)
        self.register_buffer("top", torch.tensor([top], device=like.device))
        self.asked = top
        self.heard: list[Tensor] | None = None

    @property
    def c_fc(self) -> Any:
        """By this name open_clip's own forward asks an MLP for its precision."""
        mlp: Any = self.experts[0]
        return mlp.c_fc

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):  # two experts are often nearly as probable
            probability_TN = self.router(x_TD.to(self.router.weight.dtype)).softmax(-1)
        largest_Tk, chosen_Tk = probability_TN.topk(self.asked, dim=-1)
        load_N = F.one_hot(chosen_Tk.flatten(), len(self.experts)).sum(0)
        if self.heard is not None:
            self.heard.append(torch.stack([load_N.to(probability_TN.dtype), probability_TN.sum(0)]))
        share_Tk = largest_Tk / largest_Tk.sum(-1, keepdim=True)
        return self._ask(x_TD, share_Tk, chosen_Tk, load_N).view_as(x)

    @torch.compiler.disable  # how many tokens an expert has is another number every time
    def _ask(self, x_TD: Tensor, share_Tk: Tensor, chosen_Tk: Tensor, load_N: Tensor) -> Tensor:
        """Tokens in the order of their experts, each expert's rows at once, and back."""
        order_X = chosen_Tk.flatten().argsort(stable=True)
        rows = x_TD.index_select(0, order_X // self.asked).split(_sizes(load_N, len(order_X)))
        # Every expert is called, if with nothing: each process has gradients of the same parameters.
        said_XD = torch.cat([expert(part) for expert, part in zip(self.experts, rows, strict=True)])
        said_XD = torch.empty_like(said_XD).index_copy(0, order_X, said_XD)
        return (said_XD.unflatten(0, chosen_Tk.shape) * share_Tk[..., None].to(said_XD.dtype)).sum(1)


def _sizes(load_N: Tensor, total: int) -> list[int]:
    """Rows of each expert; even ones for a plan, whose tensors have no content."""
    if isinstance(load_N, FakeTensor):
        return [total // len(load_N) + (n < total % len(load_N)) for n in range(len(load_N))]
    return load_N.tolist()


def join(model: nn.Module, experts: Experts) -> None:
    """Put experts in the place of every block's MLP, in place; again is harmless.

    Raises:
        UserError: towers without MLPs to replace, numbers that make no sense, or a model that differs from
            this one in more than its MLPs.
    """
    if held_by(model):
        return
    count = 1 + len(experts.models) if experts.models else experts.copies
    if not 0 < experts.top <= count:
        raise UserError(f"model.experts.top is {experts.top} of {count} experts; a token asks 1 to {count}")
    others = [_read(model, name) for name in experts.models]
    for path, block in _blocks(model):
        mlps = [block.mlp, *(copy.deepcopy(block.mlp) for _ in range(count - 1))]
        for mlp, tensors in zip(mlps[1:], others, strict=False):
            prefix = f"{path}.mlp."
            mlp.load_state_dict({name: tensors[prefix + name] for name in mlp.state_dict()})
        for mlp in mlps if others else ():
            mlp.requires_grad_(False)
        block.mlp = Routed(mlps, block.attn.embed_dim, experts.top, block.mlp.c_fc.weight)


def make_room(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put as many experts into a plain model as a checkpoint's tensors have, in place; often none."""
    tops = {name.removesuffix(_TOP): int(top) for name, top in tensors.items() if name.endswith(_TOP)}
    for path, block in _blocks(model) if tops else ():
        count, width = tensors[f"{path}.mlp.router.weight"].shape
        mlps = [copy.deepcopy(block.mlp) for _ in range(count)]
        block.mlp = Routed(mlps, width, tops[path], block.mlp.c_fc.weight)


def held_by(model: nn.Module) -> bool:
    """Whether this model has experts."""
    return any(isinstance(module, Routed) for module in model.modules())


@contextmanager
def overheard(model: nn.Module, wanted: bool) -> Iterator[list[list[Tensor]]]:
    """What the routers of all blocks decide while this is open, call by call: see `summed`.

    What is made again in the backward pass is not heard again.
    """
    routed = [module for module in model.modules() if isinstance(module, Routed)] if wanted else []
    for module in routed:
        module.heard = []
    try:
        yield [module.heard for module in routed if module.heard is not None]
    finally:
        for module in routed:
            module.heard = None


@contextmanager
def unheard(model: nn.Module) -> Iterator[None]:
    """Inside `overheard`, what is not to be heard."""
    kept = [(module, module.heard) for module in model.modules() if isinstance(module, Routed)]
    for module, _ in kept:
        module.heard = None
    try:
        yield
    finally:
        for module, heard in kept:
            module.heard = heard


def summed(heard: Sequence[Sequence[Tensor]]) -> Tensor | None:
    """Of every block how many tokens asked each expert, and the sum of its probabilities: routing_A2N."""
    known = next((call for calls in heard for call in calls), None)
    if known is None:
        return None
    return torch.stack([torch.stack([*calls, torch.zeros_like(known)]).sum(0) for calls in heard])


def _blocks(model: nn.Module) -> list[tuple[str, Any]]:
    """The blocks of both towers with their names."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, ResidualAttentionBlock)]
    towers = {name.startswith("visual.") for name, _ in found}
    if len(towers) < 2 or any(parametrize.is_parametrized(block.mlp.c_fc) for _, block in found):
        raise UserError(
            "experts stand in the place of the MLPs of open_clip's own transformer blocks, in both towers "
            "and without LoRA: choose model.backbone.architecture=ViT-B-16 and model.lora.rank=0"
        )
    return found


def _read(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of a finished expert."""
    file = sources.find(None, name).file
    assert file is not None, "names of weights have a file"
    tensors = fitting.renamed(model, formats.read(file).tensors)
    for key, own in merged_state_dict(model).items():
        there = tensors.get(key)
        alike = there is not None and there.shape == own.shape
        if alike and not (own.is_meta or key in _OWN or ".mlp." in key):
            alike = torch.equal(there, own.cpu())  # type: ignore[arg-type]
        if not alike:
            raise UserError(
                f"{name} differs from model.backbone in {key}, and only the MLPs of experts may: train it "
                "from the same weights with model.freeze.only=mlps (recipe=mcl), and export it"
            )
    return tensors
