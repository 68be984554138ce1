"""The floating-point operations that a CLIP step needs: real tokens only, counted twice per multiply-add.

In: an open_clip configuration and the lengths of the captions. Out: FLOPs. What padding costs is not in
here, so speed measured against it says how much of a machine does useful work.
n tokens of width D through one block: 24 D^2 n in matrix products (4 D^2 for queries to outputs, 8 D^2 for
the MLP, twice), and 4 D for every pair of a token with one it sees.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from longclip.towers import configs

TRAIN = 3
"""Backward takes the products of forward twice: towards the inputs and towards the weights."""


def config(architecture: str) -> dict[str, Any]:
    """Embedding width and the shapes of both towers."""
    return configs.named(architecture)


def image_forward(model: dict[str, Any], size: int | None = None) -> int:
    """One image through a ViT; `size` in pixels where it is not the configuration's.

    Where the class token is pooled, the last block is for it alone.
    """
    vision = model["vision_cfg"]
    width, layers, patch = vision["width"], vision["layers"], vision["patch_size"]
    patches = ((size or vision["image_size"]) // patch) ** 2
    tokens = patches + 1
    embed = 2 * 3 * patch**2 * width * patches
    block = 24 * width**2 * tokens + 4 * width * tokens**2
    alone = vision.get("pool_type", "tok") == "tok"
    last = 4 * width**2 * tokens + 20 * width**2 + 4 * width * tokens if alone else block
    return embed + (layers - 1) * block + last + 2 * width * model["embed_dim"]


def text_forward(model: dict[str, Any], lengths_BK: np.ndarray) -> int:
    """Captions of these lengths, packed: causal pairs, and a last block that only end tokens leave."""
    text = model["text_cfg"]
    width, layers = text["width"], text["layers"]
    tokens, texts = int(lengths_BK.sum()), int((lengths_BK > 0).sum())
    pairs = int((lengths_BK * (lengths_BK + 1) // 2).sum())
    block = 24 * width**2 * tokens + 4 * width * pairs
    last = 4 * width**2 * tokens + 20 * width**2 * texts + 4 * width * tokens
    return (layers - 1) * block + last + 2 * width * model["embed_dim"] * texts


def step(model: dict[str, Any], lengths_BK: np.ndarray) -> int:
    """A training step on these images and captions: both towers forward and backward, no loss."""
    return TRAIN * (len(lengths_BK) * image_forward(model) + text_forward(model, lengths_BK))
