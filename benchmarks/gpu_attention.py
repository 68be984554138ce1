"""Packed attention on the device, in bf16: right and fast.

Right: against the dense mask in float32 on the same bf16 numbers; the baseline is that dense mask in bf16,
whose error is rounding alone. Fast: against attention on captions padded to 248.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longclip.towers.attention import Layout, dense_attention, end_attention, packed_attention

from .device import Device
from .lengths import LONG, synthetic
from .measures import Row, fewer

HEADS, WIDTH = 8, 64
Attend = Callable[[Tensor], Tensor]


def rows(device: Device) -> list[Row]:
    lengths_S = synthetic(1 if device.quick else 16, seed=0).ravel().astype(np.int32)
    layout, tokens = Layout(lengths_S, device.at), int(lengths_S.sum())
    torch.manual_seed(0)
    qkv_T3HD = torch.randn(tokens, 3, HEADS, WIDTH, device=device.at).bfloat16()
    ways: dict[str, tuple[Attend, Attend]] = {
        "packed": (lambda x: packed_attention(x, layout), lambda x: dense_attention(x, layout)),
        "end": (
            lambda x: end_attention(x[:, 0].index_select(0, layout.ends_S), x[:, 1:], layout),
            lambda x: dense_attention(x, layout).index_select(0, layout.ends_S),
        ),
    }
    found: list[Row] = []
    for name, (ours, dense) in ways.items():
        exact = _both(dense, qkv_T3HD.float())
        pairs = zip(("output", "gradient"), exact, _both(ours, qkv_T3HD), _both(dense, qkv_T3HD), strict=True)
        for what, right, mine, rounded in pairs:
            measure = f"{name} attention, bf16: relative error of the {what}, against the dense mask in bf16"
            id = f"GPU.attention.{name}.{what}"
            found.append(fewer(id, measure, _apart(mine, right), _apart(rounded, right), 0.5))
    return [*found, _speed(device, layout, qkv_T3HD)]


def _speed(device: Device, layout: Layout, qkv_T3HD: Tensor) -> Row:
    captions = len(layout.lengths_S)
    padded_3SHLD = torch.randn(3, captions, HEADS, LONG, WIDTH, device=device.at).bfloat16()
    jobs = {
        "packed": lambda: _both(lambda x: packed_attention(x, layout), qkv_T3HD),
        "padded": lambda: _both(_padded, padded_3SHLD),
    }
    took = device.seconds(jobs)
    measure = f"attention of {captions} captions, forward and backward, ms, against 248 tokens each"
    return fewer("GPU.attention.ms", measure, 1e3 * took["packed"], 1e3 * took["padded"])


def _padded(qkv_3SHLD: Tensor) -> Tensor:
    q, k, v = qkv_3SHLD.unbind(0)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _both(attend: Attend, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of its sum of squares."""
    x = x.detach().requires_grad_()
    out = attend(x)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    return out.detach(), gradient


def _apart(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())
