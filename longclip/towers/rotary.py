"""Rotary positions: a text tower that knows how far tokens lie from each other, and not where they stand.

In: a model of open_clip's. Out: the same in place, whose queries and keys are turned in every block (RoPE, Su
et al. 2021, arXiv 2104.09864), for position m and each pair f of a head's d numbers by

    q'_mf = q_mf e^(i m w_f),   w_f = theta^(-2 f / d)

so that their product depends on the distance alone. The position table stays, all zeros and still: whatever
counts positions by it goes on doing so. Only packed text is turned (`attention`). Elsewhere the same weights
would run and be another model; theta is a buffer, so that a model without one refuses them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..types import UserError
from .positions import text_module

KEY = "rotary_theta"
"""In a `model_cfg` and, behind the text tower's own prefix, in a state dict."""

FACTOR = 2.0
"""How much further than needed an extension goes: TULIP's, and the usual one of dynamic NTK scaling."""


class Published(NamedTuple):
    """What weights were when they came, and a model made of them is not: how they mark positions, attend."""

    table_LD: Tensor
    theta: float | None = None  # None: not rotary
    temperature: float = 1.0  # by which their text attention was divided since (`scale_attention`)


def turn(model: nn.Module, theta: float) -> None:
    """Let positions of the text tower be rotary instead of a table, in place.

    Raises:
        UserError: no theta, or a head width without pairs.
    """
    text: Any = text_module(model)
    width = text.transformer.resblocks[0].attn.head_dim
    if not theta > 1:
        raise UserError(
            f"model.backbone.rotary is {theta}; it is a theta above 1: 10000 (RoPE, TULIP), or null"
        )
    if width % 2:
        raise UserError(f"model.backbone.rotary turns pairs of numbers, and text heads are {width} wide here")
    table = text.positional_embedding
    text.positional_embedding = nn.Parameter(torch.zeros_like(table), requires_grad=False)
    set_theta(text, theta)


def set_theta(text: Any, theta: float | None) -> None:
    """Of a text module whose table is what it should be; None: positions are those of the table alone."""
    device = text.positional_embedding.device
    text.register_buffer(KEY, None if theta is None else torch.tensor([theta], device=device))


def extended(theta: float, width: int, length: int, longer: int) -> float:
    """Theta for a longer context: dynamic NTK scaling, as TULIP (Najdenkoska et al. 2024, arXiv 2410.10034).

        theta' = theta (F longer / length - (F - 1))^(d / (d - 2)),   F = 2

    Fast turns, which tell neighbours apart, stay as they were; the slowest become slower by as much as the
    context grows. A shorter context changes nothing.
    """
    grown = max(1.0, FACTOR * longer / length - (FACTOR - 1))
    return theta * grown ** (width / (width - 2))


def frequencies(model: nn.Module) -> Tensor | None:
    """w_F of the text tower, float32; None where its positions are not rotary."""
    text: Any = text_module(model)
    theta = text._buffers.get(KEY)
    if theta is None:
        return None
    width = text.transformer.resblocks[0].attn.head_dim
    return theta.float() ** (torch.arange(0, width, 2, device=theta.device) / -width)


class Turns(NamedTuple):
    """By how much to turn each of T rows."""

    cos_TF: Tensor
    sin_TF: Tensor

    @classmethod
    def at(cls, positions_T: Tensor, frequencies_F: Tensor) -> Turns:
        angles_TF = positions_T[:, None] * frequencies_F
        return cls(angles_TF.cos(), angles_TF.sin())

    def rows(self, rows_S: Tensor) -> Turns:
        return Turns(self.cos_TF.index_select(0, rows_S), self.sin_TF.index_select(0, rows_S))

    def __call__(self, x_TNHD: Tensor) -> Tensor:
        """Turn every pair of the last axis, at least in float32; the same shape and dtype."""
        even, odd = x_TNHD.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.cos_TF[:, None, None], self.sin_TF[:, None, None]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return turned.flatten(-2).to(x_TNHD.dtype)
