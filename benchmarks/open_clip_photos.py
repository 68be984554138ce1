"""open_clip's own trainer on the photos that `experiment=flickr8k` trains on: the baseline at equal time.

    longclip shards FOLDER --layout jsonl --out datasets/flickr8k
    python -m benchmarks.open_clip_photos FOLDER --pairs 70000 --out runs/open_clip-photos
    python -m eval.run model=runs/open_clip-photos/export benchmark=shards benchmark.root=datasets/flickr8k

FOLDER holds images/ and captions.jsonl. The trainer is `open_clip_train` of the installed open_clip_torch,
unchanged, on the same backbone (ViT-photos, context 77): one caption a pair, padded, batch 128, lr 1e-3,
weight decay 0.2, float32, its own augmentation. Pairs of the train split are drawn in shuffled passes.
Needs pandas.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import open_clip

ARCHITECTURE = Path("longclip/towers/architectures/ViT-photos.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, required=True, help="pairs to train on in all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    _register(options.out)
    listing = options.out / "pairs.csv"
    with open(listing, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        pairs = _passes(_pairs(options.folder), options.seed)
        writer.writerows(next(pairs) for _ in range(options.pairs))
    started = time.monotonic()
    _train(listing, options)
    print(f"trained on {options.pairs:,} pairs in {time.monotonic() - started:.0f} s")
    _export(options.out)


def _register(out: Path) -> None:
    """The backbone at open_clip's usual context, under a name that open_clip knows."""
    config = json.loads(ARCHITECTURE.read_text())
    config["text_cfg"]["context_length"] = 77
    (out / "ViT-photos-77.json").write_text(json.dumps(config))
    open_clip.add_model_config(out / "ViT-photos-77.json")


def _pairs(folder: Path) -> list[tuple[str, str]]:
    entries = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    return [
        (str(folder / entry["image"]), caption)
        for entry in entries
        if entry["split"] == "train"
        for caption in entry["captions"]
    ]


def _passes(pairs: list[tuple[str, str]], seed: int) -> Iterator[tuple[str, str]]:
    """The pairs pass after pass, each in another order: the trainer's epoch is then the whole run."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(pairs, len(pairs))


def _train(listing: Path, options: argparse.Namespace) -> None:
    from open_clip_train.main import main as train

    train(
        f"""--train-data {listing} --dataset-type csv --csv-img-key filepath --csv-caption-key title
        --csv-separator , --model ViT-photos-77 --batch-size 128 --lr 1e-3 --wd 0.2 --precision fp32
        --warmup {options.warmup} --epochs 1 --workers {options.workers} --seed {options.seed}
        --logs {options.out} --name trainer --log-every-n-steps 50""".split()
    )


def _export(out: Path) -> None:
    from longclip.export import import_weights

    weights = out / "trainer" / "checkpoints" / "epoch_1.pt"
    folder = import_weights(str(weights), out / "export", architecture="ViT-photos-77", context_length=None)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
