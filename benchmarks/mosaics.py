"""Composed photos: four real photos as a 2x2 mosaic, their captions as one paragraph, the quadrants as boxes.

    longclip shards flickr8k.tar --layout jsonl --out datasets/flickr8k
    python -m benchmarks.mosaics datasets/flickr8k --out datasets/mosaics
    python train.py data=shards data.root=datasets/mosaics 'data.judge=[heldout,photos]' benchmark=mosaics

In: shards of photos with captions, in two splits. Out: shards of mosaics, `train` and `heldout`, which share
no photo, and `photos`, those of `heldout` as they are: what a model knew before it learnt mosaics. People
wrote every sentence, and of each it is known where in the picture it is true: what real paragraphs do not
tell. But nobody describes a picture like this, so results on it are told as composed.

A mosaic is a pure function of (seed, split, number). `--captions` of each photo's captions are shown, in an
order that mixes the photos: a paragraph of eight sentences is some 110 tokens long.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from PIL import Image, ImageOps

from longclip.data.scenes import default_tokenizer
from longclip.data.tars import shards
from longclip.data.tars.dataset import Dataset
from longclip.tokens import Tokenizer
from longclip.types import Box, Caption, Record, Sentence, UserError

QUADRANTS: tuple[Box, ...] = (
    (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0),
)  # fmt: skip


def main() -> None:
    options = _options()
    tokenizer = default_tokenizer()
    splits = {
        "train": (options.train, options.train_split),
        "heldout": (options.heldout, options.heldout_split),
    }
    for split, (count, source) in splits.items():
        photos = Dataset(options.photos / source)
        composed = compose(
            photos, f"{options.seed}/{split}", count, options.captions, options.size, tokenizer
        )
        told = shards.write(composed, options.out / split, tokenizer_hash=tokenizer.name_hash)
        print(f"{options.out / split}: {told.samples} mosaics of {len(photos)} photos")
    single = Dataset(options.photos / options.heldout_split)
    shards.write(
        (single.record(index) for index in range(len(single))),
        options.out / "photos",
        tokenizer_hash=tokenizer.name_hash,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path, help="a folder of shards in two splits")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=12_000, help="mosaics")
    parser.add_argument("--heldout", type=int, default=500)
    parser.add_argument("--train-split", default="train", help="whose photos they are made of")
    parser.add_argument("--heldout-split", default="dev")
    parser.add_argument("--captions", type=int, default=2, help="of each photo")
    parser.add_argument("--size", type=int, default=112, help="pixels of a mosaic's side")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def compose(
    photos: Dataset, seed: str, count: int, captions: int, size: int, tokenizer: Tokenizer
) -> Iterator[Record]:
    """So many mosaics of photos drawn at random, four different ones each."""
    if len(photos) < len(QUADRANTS):
        raise UserError(f"{photos.url} holds {len(photos)} photos, and a mosaic is made of {len(QUADRANTS)}")
    for number in range(count):
        chance = Random(f"{seed}/{number}")
        chosen = [photos.record(index) for index in chance.sample(range(len(photos)), len(QUADRANTS))]
        yield Record(
            f"{seed.replace('/', '-')}-{number:06d}",
            picture([record.image for record in chosen], size),
            "jpg",
            (paragraph(chosen, captions, chance, tokenizer),),
            {"photos": [record.key for record in chosen]},
        )


def picture(photos: Sequence[bytes], size: int) -> bytes:
    """The photos as the quadrants of one JPEG; of each the square in its middle."""
    canvas, side = Image.new("RGB", (size, size)), size // 2
    for photo, (left, top, *_) in zip(photos, QUADRANTS, strict=True):
        with Image.open(io.BytesIO(photo)) as opened:
            square = ImageOps.fit(opened.convert("RGB"), (side, side))
        canvas.paste(square, (round(left * size), round(top * size)))
    encoded = io.BytesIO()
    canvas.save(encoded, "JPEG", quality=92, subsampling=0)
    return encoded.getvalue()


def paragraph(photos: Sequence[Record], captions: int, chance: Random, tokenizer: Tokenizer) -> Caption:
    """Some captions of every photo in random order, each with its quadrant as its box."""
    told = [
        (_sentence(caption.text), box)
        for photo, box in zip(photos, QUADRANTS, strict=True)
        for caption in chance.sample(photo.captions, min(captions, len(photo.captions)))
    ]
    chance.shuffle(told)
    sentences, start = [], 0
    for text, box in told:
        sentences.append(Sentence(start, start + len(text), tokenizer.ids(text), box))
        start += len(text) + 1
    return Caption("composed", " ".join(text for text, _ in told), tuple(sentences))


def _sentence(text: str) -> str:
    """With a stop at its end, so that two in a row are two."""
    text = text.rstrip(" .")
    return text if text.endswith(("!", "?")) else f"{text}."


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
