"""Data of several tests: 21 small photos of waves with two captions each, and 5 to judge on."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from longclip.captions import Groups, Sentences, Whole, parse
from longclip.data.images import Augment
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.data.tars.shards import write
from longclip.tokens import Tokenizer
from longclip.types import Record

SIZE, COUNT = 16, 21
PLAN: dict[str, Any] = {"samples": 60, "batch_size": 6, "block": 2, "window": 3}
PREPROCESS = {"size": SIZE, "resize_mode": "shortest", "interpolation": "bicubic"}


def records(tokenizer: Tokenizer, count: int = COUNT) -> Iterable[Record]:
    y, x = np.mgrid[0:20, 0:24]
    for number in range(count):
        waves = [127 + 100 * np.sin((x + y * c + number) / 4) for c in range(3)]
        image = simplejpeg.encode_jpeg(np.ascontiguousarray(np.stack(waves, 2).astype(np.uint8)))
        captions = (
            parse(f"Photo {number}. It shows waves. They are soft. I like {number}.", "human", tokenizer),
            parse(f"Number {number}.", "alt", tokenizer),
        )
        box = (0.0, 0.0, 0.5, 0.5)
        first = captions[0]._replace(sentences=tuple(s._replace(box=box) for s in captions[0].sentences))
        yield Record(f"k{number}", image, "jpg", (first, captions[1]))


def make(root: Path, tokenizer: Tokenizer) -> Path:
    """The photos as shards, in a folder."""
    for split, count in (("train", COUNT), ("dev", 5)):
        write(
            records(tokenizer, count), root / split, samples_per_shard=8, tokenizer_hash=tokenizer.name_hash
        )
    return root


def module(root: Path, tokenizer: Tokenizer, **changes: Any) -> DataModule:
    """A data module of the photos; changes go to it or to its plan."""
    groups = changes.pop("groups", None) or Groups({"long": Whole(), "sub": Sentences(3)}, seed=0)
    plan = {name: changes.pop(name) for name in list(changes) if name in Plan.__dataclass_fields__}
    options: dict[str, Any] = {"train": "train", "workers": 0, "plan": Plan(**PLAN | plan)}
    options |= {
        "augment": Augment((0.3, 1.0), flip=0.5, jitter=0.2),
        "judge": ["dev"],
        "preprocess": PREPROCESS,
    }
    return DataModule(root=root, groups=groups, tokenizer=tokenizer, **options | changes)
