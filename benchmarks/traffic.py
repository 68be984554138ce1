"""What a step sends, holds and computes on paper: the formulas behind `benchmarks.scaling`.

In: assumptions and a number of processes. Out: bytes, FLOPs, seconds. Bytes are per GPU and step, and those
it sends; it receives as many. Local legend: W processes, B images of each, K captions of an image, E width
of a feature.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import open_clip
import torch

from . import lengths, work


def _given(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Assumptions:
    """What the tables rest on. The defaults are an H200's, training in bf16-mixed."""

    model: str = _given("ViT-B-16", "an open_clip architecture with a ViT")
    batch: int = _given(512, "images of each GPU, B")
    captions: int = _given(9, "captions of each image, K: the long one and its sub-captions")
    feature_bytes: int = _given(4, "of a number of a feature; features are float32")
    param_bytes: int = _given(4, "of a parameter (DeepSpeed's bf16: 2)")
    grad_bytes: int = _given(4, "of its gradient (DeepSpeed's bf16: 2)")
    optim_bytes: int = _given(8, "of its optimiser state (DeepSpeed's bf16: 12, with the float32 copy)")
    activation_bytes: float = _given(34, "kept for backward for every token, layer and unit of width")
    memory: float = _given(130, "GiB of a GPU that a step may use")
    tflops: float = _given(790, "TFLOP/s of a GPU's large bf16 products")
    mfu: float = _given(0.4, "share of them that the towers reach on real tokens")
    node: int = _given(8, "GPUs of a node")
    inside: float = _given(360, "GB/s a GPU sends inside a node")
    between: float = _given(40, "GB/s a GPU sends to another node")
    latency: float = _given(5, "microseconds of every hop of a ring")

    @cached_property
    def config(self) -> dict[str, Any]:
        return work.config(self.model)

    @property
    def width(self) -> int:
        """E."""
        return int(self.config["embed_dim"])

    @cached_property
    def lengths_BK(self) -> Any:
        """The last captions of the synthetic distribution: the long one and sub-captions before it."""
        return lengths.synthetic(4096, seed=0)[:, -self.captions :]

    @cached_property
    def parameters(self) -> int:
        """With text positions up to LONG tokens."""
        with torch.device("meta"):
            model = open_clip.model.CLIP(**_long(self.config))
        return sum(p.numel() for p in model.parameters())

    @cached_property
    def flops(self) -> float:
        """Of both towers, forward and backward, for one image and its captions."""
        return work.step(self.config, self.lengths_BK) / len(self.lengths_BK)

    @property
    def activations(self) -> float:
        """Bytes kept for one image and its captions."""
        vision, text = self.config["vision_cfg"], self.config["text_cfg"]
        image = vision["width"] * vision["layers"] * ((vision["image_size"] // vision["patch_size"]) ** 2 + 1)
        tokens = self.lengths_BK.sum() / len(self.lengths_BK)
        return float(self.activation_bytes * (image + text["width"] * text["layers"] * tokens))

    @property
    def image_block(self) -> int:
        """Bytes of one GPU's image features."""
        return self.batch * self.width * self.feature_bytes

    @property
    def sums(self) -> int:
        """Bytes of one number for every slot of one GPU's images."""
        return self.batch * self.captions * self.feature_bytes

    def bandwidth(self, world: int) -> float:
        """Bytes a second that a ring brings to every GPU; the GPUs of a node share their network."""
        return 1e9 * (self.inside if world <= self.node else min(self.inside, self.node * self.between))


def all_gather(world: int, own: float) -> float:
    """Bytes sent where every process ends up with everyone's `own` bytes."""
    return (world - 1) * own


def reduce_scatter(world: int, own: float) -> float:
    """Bytes sent where every process ends up with the sum of its `own` bytes of what all hold."""
    return (world - 1) * own


def all_reduce(world: int, whole: float) -> float:
    """Bytes sent where every process ends up with the sum of `whole` bytes."""
    return 2 * (world - 1) / world * whole


def all_to_all(world: int, part: float) -> float:
    """Bytes sent where every process has `part` bytes for each of the others."""
    return (world - 1) * part


def stationary(a: Assumptions, world: int) -> float:
    """What longclip does: images travel to all and their gradients back, summed; captions stay.

    What an image sees of a process's captions are two numbers a slot, which go to the image's own process,
    and their gradients back. And everyone learns which captions exist.
    """
    images = all_gather(world, a.image_block) + reduce_scatter(world, a.image_block)
    mask = all_gather(world, a.batch * a.captions)
    return images + mask + 2 * all_to_all(world, 2 * a.sums)


def gathered(a: Assumptions, world: int) -> float:
    """What open_clip's `gather_with_grad` does: all images and captions to all, their gradients back."""
    features = a.image_block * (1 + a.captions)
    return all_gather(world, features) + reduce_scatter(world, features)


def ring(a: Assumptions, world: int) -> float:
    """Images go round, captions stay: with an image its sums of exponentials, in backward its gradient.

    Forward W - 1 hops and the sums' way home; backward the same hops again, and the gradient's W.
    """
    if world == 1:
        return 0
    return (world - 1) * 2 * (a.image_block + a.sums) + a.sums + world * a.image_block


def held(a: Assumptions, world: int) -> tuple[float, float, float]:
    """Bytes of features and their gradients in the three ways: stationary, gathered, ring."""
    texts, everyones = a.image_block * a.captions, world * a.image_block
    visiting = min(world, 2) * a.image_block  # the own block and the one that is passing
    numbers = 2 * world * a.sums
    return 2 * (everyones + texts + numbers), 2 * (everyones + world * texts), 2 * (visiting + texts)


def contrast_flops(a: Assumptions, world: int) -> float:
    """Of the stationary InfoNCE in tiles on one process: scores, the same again, and two gradients.

    Where everything is gathered each score is made twice, by its image's and by its caption's process.
    """
    return 4 * 2 * a.batch * (world * a.batch) * a.captions * a.width


def zero_held(a: Assumptions, world: int, stage: int) -> float:
    """Bytes of parameters, gradients and optimiser states (ZeRO, Rajbhandari et al. 2020, figure 1)."""
    shared = [world if stage >= least else 1 for least in (3, 2, 1)]
    sizes = (a.param_bytes, a.grad_bytes, a.optim_bytes)
    return a.parameters * sum(size / parts for size, parts in zip(sizes, shared, strict=True))


def zero_sent(a: Assumptions, world: int, stage: int) -> float:
    """Bytes sent for gradients and parameters: stage 3 fetches parameters forward and backward."""
    grads, params = a.parameters * a.grad_bytes, a.parameters * a.param_bytes
    if stage == 0:
        return all_reduce(world, grads)
    fetches = 2 if stage == 3 else 1
    return reduce_scatter(world, grads / world) + fetches * all_gather(world, params / world)


def travel(a: Assumptions, world: int, sent: float, hops: int) -> float:
    """Seconds for bytes sent round a ring."""
    return sent / a.bandwidth(world) + hops * a.latency * 1e-6


def _long(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "text_cfg": {**config["text_cfg"], "context_length": lengths.LONG}}
