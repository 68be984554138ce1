"""A small data set of real JPEGs with captions, as shards, and the data module over it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import simplejpeg

from longclip.captions import Groups, Sentences, Whole, parse
from longclip.data.images import Augment
from longclip.data.module import DataModule
from longclip.data.plans.plan import Plan
from longclip.data.tars.index import VERSION, Index, Shard, digests, dump, dump_list, index_name
from longclip.data.tars.shards import write
from longclip.tokens import Tokenizer
from longclip.types import Record

SIZE = 16
PREPROCESS = {"size": SIZE, "resize_mode": "shortest", "interpolation": "bicubic"}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 77)


def jpeg(number: int) -> bytes:
    y, x = np.mgrid[0:20, 0:24]
    waves = [127 + 100 * np.sin((x + y * c + number) / 4) for c in range(3)]
    return simplejpeg.encode_jpeg(np.ascontiguousarray(np.stack(waves, 2).astype(np.uint8)))


def record(number: int) -> Record:
    text = f"Photo {number}. It shows waves. They are soft. I like {number}."
    return Record(f"k{number}", jpeg(number), "jpg", (parse(text, "human", tokenizer()),), {"n": number})


def records(count: int) -> Iterator[Record]:
    yield from (record(number) for number in range(count))


def make(folder: Path, found: Sequence[Record], samples_per_shard: int = 8) -> Path:
    write(found, folder, samples_per_shard, tokenizer().name_hash)
    return folder


def module(root: object, **changes: Any) -> DataModule:
    plan = {"samples": 60, "batch_size": 6, "block": 2, "window": 3}
    plan |= {name: changes.pop(name) for name in list(changes) if name in plan}
    options: dict[str, Any] = {"train": "train", "judge": [], "workers": 0, "augment": Augment((0.3, 1.0))}
    groups = Groups({"long": Whole(), "sub": Sentences(3)}, seed=0)
    options |= {"plan": Plan(**plan), "groups": groups, "tokenizer": tokenizer(), "preprocess": PREPROCESS}
    return DataModule(root=root, **options | changes)  # type: ignore[arg-type]


def handmade(folder: Path, samples: Sequence[Mapping[str, bytes]]) -> Path:
    """One shard of whatever members, with an honest index: what a faulty tool would leave."""
    folder.mkdir(parents=True)
    ends = [0]
    with tarfile.open(folder / "000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, members in enumerate(samples):
            for extension, content in members.items():
                info = tarfile.TarInfo(f"k{number}.{extension.rstrip('+')}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            ends.append(tar.offset)
    sizes = [stop - start for start, stop in pairwise(ends)]
    sha256, crcs, size = digests(folder / "000000.tar", sizes)
    keys, count = [f"k{n}" for n in range(len(samples))], len(samples)
    index = Index(
        version=VERSION, samples=count, keys=keys, offsets=ends[:-1], sizes=sizes, crcs=crcs,
        lengths=[0] * count, captions=count, bytes=size, sha256=sha256, tokenizer=tokenizer().name_hash,
    )  # fmt: skip
    (folder / index_name("000000.tar")).write_bytes(dump(index._asdict()))
    (folder / "shards.json").write_bytes(dump_list([Shard("000000.tar", count, count, size, sha256)]))
    return folder


def described(**changes: object) -> bytes:
    caption = {"source": "human", "text": "A dog. It runs.", "sentences": [[0, 6], [7, 15]]} | changes
    return json.dumps({"captions": [caption], "meta": {}}).encode()
