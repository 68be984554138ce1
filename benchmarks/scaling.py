"""A training step on paper, on 1 to 1,024 GPUs: bytes that travel, bytes that are held, and time.

    python -m benchmarks.scaling --help                       # every assumption is an argument
    python -m benchmarks.scaling --model ViT-L-14 --batch 256 --captions 2
    python -m benchmarks.scaling --markdown docs/scaling.md   # writes the tables of the document

Nothing here was measured on GPUs. The bytes of the collectives are those that two processes really send: a
test counts them.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from . import documents
from .traffic import (
    Assumptions,
    contrast_flops,
    gathered,
    held,
    ring,
    stationary,
    travel,
    zero_held,
    zero_sent,
)

GPUS = (1, 2, 8, 64, 256, 1024)
GIB, MIB = 2**30, 2**20
WAYS = {"ours": stationary, "gathered": gathered, "ring": ring}


def _features(a: Assumptions) -> str:
    head = ["GPUs", "global batch", *(f"{way}: sent" for way in WAYS), *(f"{way}: held" for way in WAYS)]
    lines = []
    for world in GPUS:
        sizes = [*(sent(a, world) for sent in WAYS.values()), *held(a, world)]
        lines.append([f"{world:,}", f"{world * a.batch:,}", *(f"{size / MIB:,.1f}" for size in sizes)])
    return documents.table(head, lines)


def _captions(a: Assumptions, world: int = 64) -> str:
    lines = []
    for captions in (1, 2, 5, 9):
        sent = [way(replace(a, captions=captions), world) / MIB for way in WAYS.values()]
        lines.append([str(captions), *(f"{size:,.1f}" for size in sent)])
    return documents.table(["captions an image", *WAYS], lines)


def _time(a: Assumptions) -> str:
    head = ["GPUs", "towers", "loss", "features", "gradients", "efficiency", "gradients hidden", "gathered"]
    lines, speed = [], a.tflops * 1e12 * a.mfu
    for world in GPUS:
        towers, loss = a.batch * a.flops / speed, contrast_flops(a, world) / speed
        # Images, masks and sums, forward; gradients of images and sums, backward.
        features = travel(a, world, stationary(a, world), 5 * (world - 1))
        everything = travel(a, world, gathered(a, world), 4 * (world - 1))
        grads = travel(a, world, zero_sent(a, world, 0), 2 * (world - 1))
        late = max(0.0, grads - towers * 2 / 3)  # backward is two thirds of the towers' time
        times = [f"{1000 * value:,.1f}" for value in (towers, loss, features, grads)]
        whole = loss + features + grads, loss + features + late, 2 * loss + everything + late
        lines.append([f"{world:,}", *times, *(f"{towers / (towers + rest):.1%}" for rest in whole)])
    return documents.table(head, lines)


def _zero(a: Assumptions) -> str:
    head = ["GPUs", *(f"stage {s}: held" for s in range(4)), *(f"{s}: sent" for s in range(4)), "images"]
    lines = []
    for world in GPUS:
        sizes = [f"{zero_held(a, world, stage) / GIB:,.2f}" for stage in range(4)]
        sent = [f"{zero_sent(a, world, stage) / GIB:,.2f}" for stage in range(4)]
        room = [(a.memory * GIB - zero_held(a, world, stage)) / a.activations for stage in (0, 3)]
        lines.append([f"{world:,}", *sizes, *sent, " to ".join(f"{max(0, int(fit)):,}" for fit in room)])
    return documents.table(head, lines)


def tables(a: Assumptions) -> str:
    """All tables, as Markdown."""
    said = f"{a.model}: {a.parameters / 1e6:.1f} M parameters, {a.flops / 1e9:.0f} GFLOP and "
    said += f"{a.activations / MIB:.0f} MiB of activations for an image with {a.captions} captions, "
    said += f"{a.batch} images a GPU, E = {a.width}."
    titles = {
        "Features, MiB": _features(a),
        "Features by captions, 64 GPUs, MiB sent": _captions(a),
        "Time of a step, ms, and the share of it in the towers": _time(a),
        "ZeRO stages, GiB; images that fit beside stage 0 to stage 3": _zero(a),
    }
    return "\n\n".join([said, *(f"**{title}**\n\n{table}" for title, table in titles.items())])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for f in fields(Assumptions):
        name = f"--{f.name.replace('_', '-')}"
        parser.add_argument(name, type=type(f.default), default=f.default, help=f.metadata["help"])
    parser.add_argument("--markdown", type=Path, help="a document with marks named after the model")
    options = vars(parser.parse_args())
    document = options.pop("markdown")
    a = Assumptions(**options)
    print(tables(a))
    if document:
        documents.replace(document, a.model, tables(a))


if __name__ == "__main__":
    main()
