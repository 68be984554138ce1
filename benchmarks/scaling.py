"""A training step on paper, on 1 to 1,024 GPUs: bytes that travel, bytes that are held, and time.

    python -m benchmarks.scaling --help                       # every assumption is an argument
    python -m benchmarks.scaling --model ViT-L-14 --batch 256 --captions 2
    python -m benchmarks.scaling --markdown docs/scaling.md   # writes the tables of the document

Nothing here was measured on GPUs. The bytes of the collectives are those that two processes really send: a
test counts them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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


def _features(a: Assumptions) -> str:
    head = ["GPUs", "global batch", "gathered: sent", "ring", "stationary"]
    head += ["gathered: held", "ring", "stationary", "loss FLOPs"]
    lines = []
    for world in GPUS:
        sent = [gathered(a, world), ring(a, world), stationary(a, world)]
        sizes = [f"{value / MIB:,.1f}" for value in (*sent, *held(a, world))]
        share = contrast_flops(a, world) / (a.batch * a.flops)
        lines.append([f"{world:,}", f"{world * a.batch:,}", *sizes, f"{share:.1%}"])
    return documents.table(head, lines)


def _captions(a: Assumptions, world: int = 64) -> str:
    ways: list[Callable[[Assumptions, int], float]] = [gathered, ring, stationary]
    counts = [replace(a, captions=k) for k in (1, 2, 5, 9)]
    head = ["captions an image", "gathered: sent", "ring", "stationary", "grouping adds"]
    lines = []
    for b in counts:
        grouping = gathered(b, world, vectors=b.captions - 1) - gathered(b, world)
        lines.append(
            [str(b.captions), *(f"{v / MIB:,.1f}" for v in (*(w(b, world) for w in ways), grouping))]
        )
    return documents.table(head, lines)


def _time(a: Assumptions) -> str:
    head = ["GPUs", "towers", "loss", "features", "gradients", "efficiency", "gradients hidden"]
    lines = []
    speed = a.tflops * 1e12 * a.mfu
    for world in GPUS:
        towers, loss = a.batch * a.flops / speed, contrast_flops(a, world) / speed
        features = travel(a, world, gathered(a, world), 5 * (world - 1))
        grads = travel(a, world, zero_sent(a, world, 0), 2 * (world - 1))
        late = max(0.0, grads - towers * 2 / 3)  # backward is two thirds of the towers' time
        times = [f"{1000 * value:,.1f}" for value in (towers, loss, features, grads)]
        parts = [towers / (towers + loss + features + rest) for rest in (grads, late)]
        lines.append([f"{world:,}", *times, *(f"{part:.1%}" for part in parts)])
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
        "Features and the loss, MiB": _features(a),
        "Features by captions, 64 GPUs, MiB sent": _captions(a),
        "Time of a step, ms": _time(a),
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
