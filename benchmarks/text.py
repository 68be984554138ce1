"""Text at the price of its real tokens: the packed text tower against open_clip's own on padded tables.

One long caption and its sub-captions an image, ViT-B/16's text tower, forward and backward. FLOPs and saved
bytes are counted on fake tensors, which have shapes and no numbers; a real run counts the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIP
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longclip.towers.attention import Layout
from longclip.towers.text import encode_packed

from . import padded, work
from .lengths import SOURCES, synthetic
from .measures import Job, Row, at_most, fewer, flops, saved_bytes, seconds
from .padded import Captions

ARCHITECTURE = "ViT-B-16"
Encode = Callable[[CLIP, Captions], Tensor]
WAYS: Mapping[str, Encode] = {
    "pad248": padded.at_full_context,
    "pad77+248": padded.at_two_lengths,
}
GOALS = {  # over everything at 248, over sub-captions at 77
    "P1": {"pad248": 7.3, "pad77+248": 2.8},
    "P2": {"pad248": 6.5, "pad77+248": 2.3},
    "P3": {"pad248": 6.5},
}


def rows(quick: bool, folder: Path) -> list[Row]:
    layers, images = (2, 1) if quick else (12, 2)
    found: list[Row] = []
    for name, draw in SOURCES.items():
        tag = "" if name == "synthetic" else f".{name}"
        lengths_BK = draw(8, 0)
        found += _counted(lengths_BK, layers, tag)
        found += _timed(padded.captions(draw(images, 0)), layers, tag, rounds=1 if quick else 4)
    return found + _compared(padded.captions(synthetic(1, 0)), layers)


def layout_of(captions: Captions) -> Layout:
    lengths_S = captions.lengths_BK[captions.lengths_BK > 0]
    return Layout(lengths_S.numpy(), torch.device("cpu"))


def ours(model: CLIP, captions: Captions, layout: Layout | None = None) -> Tensor:
    """The packed text tower: text_SE, not normalised, in the order of the captions."""
    return encode_packed(model, captions.tokens_T, layout or layout_of(captions))


def _counted(lengths_BK: np.ndarray, layers: int, tag: str) -> list[Row]:
    """P1 and P3."""
    captions = padded.captions(lengths_BK)
    layout = layout_of(captions)  # reads its lengths, which a fake tensor has not
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = padded.model(ARCHITECTURE, layers)
        jobs = _jobs(model, captions, partial(ours, layout=layout))
        counted = {name: flops(job) for name, job in jobs.items()}
        kept = {name: saved_bytes(job) for name, job in jobs.items()}
    least = work.TRAIN * work.text_forward(padded.config(ARCHITECTURE, layers), lengths_BK)
    images, found = len(lengths_BK), []
    for way in WAYS:
        goal, limit = GOALS["P1"].get(way), f"{counted[way] / least:.2f}"
        measure = f"text tower, FLOPs an image, {layers} layers, against {way}"
        found.append(
            fewer(f"P1.{way}{tag}", measure, counted["ours"] / images, counted[way] / images, goal, limit)
        )
    for way in WAYS:
        measure = f"text tower, bytes saved for backward an image, against {way}"
        goal = GOALS["P3"].get(way)
        found.append(fewer(f"P3.{way}{tag}", measure, kept["ours"] / images, kept[way] / images, goal))
    return found


def _timed(captions: Captions, layers: int, tag: str, rounds: int) -> list[Row]:
    """P2."""
    model = padded.model(ARCHITECTURE, layers)
    took = seconds(_jobs(model, captions), rounds)
    found = []
    for way in WAYS:
        measure = f"text tower, seconds for {len(captions.lengths_BK)} images, against {way}"
        found.append(fewer(f"P2.{way}{tag}", measure, took["ours"], took[way], GOALS["P2"][way]))
    return found


def _compared(captions: Captions, layers: int) -> list[Row]:
    """P4: the largest difference, as a share of the largest number of its tensor."""
    model = padded.model(ARCHITECTURE, layers)
    weight_SE = torch.randn(len(captions.padded_SL), model.text_projection.shape[1])
    features, gradients = {}, {}
    for name, encode in {"ours": ours, "pad248": padded.at_full_context}.items():
        model.zero_grad(set_to_none=True)
        features[name] = encode(model, captions)
        (features[name] * weight_SE).sum().backward()
        gradients[name] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients["ours"].keys() == gradients["pad248"].keys()
    apart = max(_apart(g, gradients["pad248"][name]) for name, g in gradients["ours"].items())
    what = "text tower, {} against pad248, relative"
    return [
        at_most("P4.features", what.format("features"), _apart(features["ours"], features["pad248"]), 2e-6),
        at_most("P4.gradients", what.format("gradients"), apart, 1e-4),
    ]


def _jobs(model: CLIP, captions: Captions, ours: Encode = ours) -> dict[str, Job]:
    """Each way forward and backward."""

    def job(encode: Encode) -> Job:
        def step() -> None:
            model.zero_grad(set_to_none=True)
            encode(model, captions).sum().backward()

        return step

    return {name: job(encode) for name, encode in {"ours": ours, **WAYS}.items()}


def _apart(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())
