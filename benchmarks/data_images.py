"""Decode and augment 500-pixel JPEGs: ours against `open_clip.transform.image_transform`, on one core.

open_clip's makes normalised float32, ours uint8, since normalising happens on the device.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import torch
from open_clip.transform import image_transform
from PIL import Image

from longclip.data.images import Augment, EvalTransform, decode

from .data_synthetic import photo
from .measures import Row, at_most, faster, rates

SIZE = 224


def rows(quick: bool, folder: Path) -> list[Row]:
    photos = [photo(seed) for seed in range(3 if quick else 24)]
    return [*_speed(photos, rounds=2 if quick else 30), *_levels(photos)]


def _speed(photos: list[bytes], rounds: int) -> list[Row]:
    theirs = {train: image_transform(SIZE, is_train=train) for train in (False, True)}
    transform, augment, rng = EvalTransform(SIZE), Augment(), random.Random(0)
    jobs: dict[str, Callable[[bytes], object]] = {
        "eval": lambda data: transform(decode(data)),
        "eval, open_clip": lambda data: theirs[False](Image.open(io.BytesIO(data))),
        "train": lambda data: augment(decode(data), SIZE, rng),
        "train, open_clip": lambda data: theirs[True](Image.open(io.BytesIO(data))),
    }
    found = rates({name: (job, photos) for name, job in jobs.items()}, rounds)
    what = "decode and {}, 500 px JPEG, images/s on one core"
    return [
        faster(
            "P11.eval",
            what.format("evaluation transform"),
            found["eval"],
            found["eval, open_clip"],
            2.5,
            "4.2x",
        ),
        faster(
            "P11.train",
            what.format("training transform"),
            found["train"],
            found["train, open_clip"],
            2.5,
            "4.2x",
        ),
    ]


def _levels(photos: list[bytes]) -> list[Row]:
    theirs = image_transform(SIZE, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    ours = EvalTransform(SIZE)
    apart = torch.stack(
        [(ours(decode(data)) - 255 * theirs(Image.open(io.BytesIO(data)))).abs().round() for data in photos]
    )
    share = apart.gt(0).float().mean().item()
    return [
        at_most(
            "P11.levels", "evaluation transform, largest difference in grey levels", apart.max().item(), 1
        ),
        Row("P11.share", "evaluation transform, values that differ at all, in 1,000", 1000 * share),
    ]
