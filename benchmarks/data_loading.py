"""From tar files to batches: our `DataModule` against open_clip's webdataset pipeline, same shards.

open_clip's trainer is no library, so its pipeline is put together here from the same parts in the same
order: webdataset's readers and decoder, open_clip's training transform and tokenizer, batches made in the
workers. It is spared the shuffling that it does in training. One caption an image is what it offers;
its caption with eight sentences is our extension of it, reading the sentences from the `json` member.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import webdataset as wds
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform
from torch import Tensor

from longclip.captions import Groups, Policy, Sentences, Whole
from longclip.data.images import Augment
from longclip.data.loading import Loader
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.tokens import Tokenizer

from .data_synthetic import SENTENCES, photo, shards
from .measures import Row, faster

SIZE, CONTEXT = 224, 248


def rows(quick: bool, folder: Path) -> list[Row]:
    batch, batches, rounds = (4, 6, 1) if quick else (64, 14, 4)
    tokenizer = Tokenizer(SimpleTokenizer(), CONTEXT)
    photos = [photo(seed) for seed in range(2 if quick else 48)]
    folder = folder / "train"
    shards(folder, photos, batch * batches, batch * batches // 2, tokenizer)
    found = []
    for workers, least in ((0, None), (2, 2.0)):
        for several in (False, True):
            jobs: dict[str, Iterable[Any]] = {
                "ours": our_loader(folder, tokenizer, batch, batch * batches, workers, several),
                "theirs": _theirs(folder, batch, workers, several),
            }
            best = _turns(jobs, batch, workers, rounds)
            text = f"long caption + {SENTENCES} sentences" if several else "one caption"
            measure = f"tar to batch, {text}, {workers or 'no'} workers, images/s"
            id = f"P12.{workers}.{'nine' if several else 'one'}"
            found.append(faster(id, measure, best["ours"], best["theirs"], least, "3x" if least else None))
    return found


def _turns(jobs: Mapping[str, Iterable[Any]], batch: int, workers: int, rounds: int) -> dict[str, float]:
    """The best rate of every job, taking turns."""
    best = dict.fromkeys(jobs, 0.0)
    for _ in range(rounds):
        for name, loader in jobs.items():
            best[name] = max(best[name], _rate(loader, batch, workers))
    return best


def our_loader(
    folder: Path,
    tokenizer: Tokenizer,
    batch: int,
    samples: int,
    workers: int,
    several: bool,
    size: int = SIZE,
) -> Loader:
    """What a training with these arguments reads."""
    groups: dict[str, Policy] = {"long": Whole()}
    if several:
        groups["sentences"] = Sentences(SENTENCES)
    module = DataModule(
        root=folder.parent,
        train=folder.name,
        judge=[],
        plan=Plan(samples, batch),
        groups=Groups(groups, seed=0),
        tokenizer=tokenizer,
        preprocess={"size": size, "resize_mode": "shortest", "interpolation": "bicubic"},
        workers=workers,
        augment=Augment(),
    )
    return module.train_dataloader()


def _theirs(folder: Path, batch: int, workers: int, several: bool) -> Iterable[tuple[Tensor, Tensor]]:
    """Steps and order of `get_wds_dataset` in open_clip's `open_clip_train/data.py`."""
    tokenizer = SimpleTokenizer()
    text = partial(_nine, tokenizer=tokenizer) if several else partial(_one, tokenizer=tokenizer)
    dataset = wds.DataPipeline(
        wds.SimpleShardList(sorted(str(path) for path in folder.glob("*.tar"))),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.select(_complete),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="json" if several else "txt"),
        wds.map_dict(image=image_transform(SIZE, is_train=True), text=text),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=False),
    )
    loader: Iterable[tuple[Tensor, Tensor]] = wds.WebLoader(dataset, batch_size=None, num_workers=workers)
    return loader


def _complete(sample: dict[str, Any]) -> bool:
    return "txt" in sample and bool({"png", "jpg", "jpeg", "webp"} & sample.keys())


def _one(text: str, tokenizer: SimpleTokenizer) -> Tensor:
    return tokenizer(text, CONTEXT)[0]


def _nine(described: dict[str, Any], tokenizer: SimpleTokenizer) -> Tensor:
    caption = described["captions"][0]
    sentences = [caption["text"][start:end] for start, end in caption["sentences"]]
    padded = [*sentences, *[""] * SENTENCES][:SENTENCES]
    return tokenizer([caption["text"], *padded], CONTEXT)


def _rate(loader: Iterable[Any], images: int, workers: int) -> float:
    """Images per second once every worker has delivered its first batch.

    The main process only waits, so no worker ever pauses.
    """
    first = max(workers, 1)
    iterator = iter(loader)
    for _ in range(first):
        next(iterator)
    started = time.perf_counter()
    batches = sum(1 for _ in iterator)
    return batches * images / (time.perf_counter() - started)
