"""Images a second: our step on Flickr8k-like photos against open_clip's, same backbone, same run.

    python -m benchmarks.photos

Ours: five captions an image, packed, each slot its own InfoNCE. open_clip: one caption an image, padded
to 77 tokens, its own forward and `ClipLoss`. Both with AdamW in float32 on random pixels and captions of
the given length, steps interleaved, the fastest of each counted. No data loading on either side.
"""

from __future__ import annotations

import argparse
import copy
import time
from array import array
from typing import Any

import torch
from open_clip.loss import ClipLoss

from longclip.objectives import Contrastive
from longclip.optim import AdamW
from longclip.tokens import pack
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.types import Batch, Text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--tokens", type=int, default=11, help="mean tokens of a caption, without start and end"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    ours = build("ViT-photos", None, 248)
    tower = DualTower(ours)
    theirs: Any = build("ViT-photos", None, 77).model
    batch = _batch(tower, options.batch, options.tokens)
    steps = {"longclip, 5 captions": _ours(tower, batch), "open_clip, 1 caption": _theirs(theirs, batch)}
    best = {name: float("inf") for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - started)
    for name, seconds in best.items():
        print(f"{name}: {options.batch / seconds:.1f} images/s ({seconds:.2f} s a step of {options.batch})")


def _batch(tower: DualTower, size: int, tokens: int) -> Batch:
    texts = [
        [
            Text(array("H", torch.randint(500, 40_000, (max(int(n), 3),)).tolist()))
            for n in torch.normal(tokens, 3.0, (5,))
        ]
        for _ in range(size)
    ]
    packed = pack(texts, tower.tokenizer)
    pixels = torch.randint(0, 256, (size, 3, 112, 112), dtype=torch.uint8)
    return Batch([str(i) for i in range(size)], pixels, *packed)


def _ours(tower: DualTower, batch: Batch) -> Any:
    optimizer, term = AdamW(lr=1e-3, warmup=0, samples=1).build(tower), Contrastive("each")

    def step() -> None:
        optimizer.zero_grad()
        term(tower(batch, {"each": slice(0, 5)})).value.backward()
        optimizer.step()

    return step


def _theirs(model: Any, batch: Batch) -> Any:
    optimizer = AdamW(lr=1e-3, warmup=0, samples=1).build(model)
    loss = ClipLoss()
    pixels = copy.deepcopy(batch.pixels_BCHW).float() / 255
    ids = torch.zeros(len(pixels), 77, dtype=torch.long)
    starts = torch.cumsum(batch.lengths_BK.flatten(), 0)[::5] - batch.lengths_BK[:, 0]
    for row, start, length in zip(ids, starts, batch.lengths_BK[:, 0], strict=True):
        row[: int(length)] = batch.tokens_T[int(start) : int(start + length)]

    def step() -> None:
        optimizer.zero_grad()
        image, text, scale = model(pixels, ids)
        loss(image, text, scale).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
