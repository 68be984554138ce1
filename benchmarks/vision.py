"""Cheaper vision at equal compute: patch dropout, smaller images and shorter captions, R@1 against FLOPs.

    python -m benchmarks.vision                              # two seeds of everything, about an hour alone
    python -m benchmarks.vision --seeds 1 --methods whole flip
    python -m benchmarks.vision --report                     # no training: what is there so far

Every run is `python train.py curriculum...=...` on the embedded scenes; one that is there is not repeated, an
unfinished one goes on. What a batch costs is counted by torch on real batches of every stage, both towers
forward and backward, and a cheaper method trains on as many more images as that pays for. The tower has
patches of 8 pixels, so that images cost more than texts (61 %), as they do in a ViT-B/16.
Writes docs/vision.json, docs/vision.png and the table in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from longclip import runs
from longclip.data.converting.workers import processors

from . import documents
from .measures import flops
from .trainings import finished, train

TUNED = 0.8  # of a run's images: then every image and caption is whole
METHODS = {
    "whole": [],
    "dropout 0.5": ["curriculum.patch_dropout=[[0,0.5]]"],
    "dropout 0.75": ["curriculum.patch_dropout=[[0,0.75]]"],
    "flip": [f"curriculum.patch_dropout=[[0,0.5],[{TUNED},0]]"],
    "small images": [f"curriculum.image_size=[[0,48],[{TUNED},null]]"],
    "short captions": [f"curriculum.context_length=[[0,64],[{TUNED},null]]"],
    "clipa": [
        f"curriculum.image_size=[[0,48],[{TUNED},null]]",
        f"curriculum.context_length=[[0,64],[{TUNED},null]]",
    ],
}
MODEL = ["model.backbone.architecture=ViT-scenes-8"]
JUDGED = 12  # times along a run
LEVELS = (25, 50, 75)  # R@1 in %, for how much compute it takes
BATCHES = 3  # that are counted of every stage


class Cost(NamedTuple):
    """FLOPs of an image with its captions, both towers, forward and backward."""

    stages: list[tuple[float, float]]  # share of the run from which it holds, FLOPs

    def until(self, share: float) -> float:
        """FLOPs of an image on average, times the share of the run that is done."""
        ends = [start for start, _ in self.stages[1:]] + [1.0]
        return sum(
            max(0.0, min(end, share) - start) * cost
            for (start, cost), end in zip(self.stages, ends, strict=True)
        )


Curve = list[tuple[float, float]]
"""(FLOPs so far, R@1 of whole captions, mean of both directions, in %)."""


def main() -> None:
    options = _options()
    costs = {name: cost(METHODS[name], options.data) for name in dict.fromkeys(["whole", *options.methods])}
    samples = {name: _affordable(costs["whole"], found, options.samples) for name, found in costs.items()}
    curves: dict[str, dict[int, Curve]] = {name: {} for name in options.methods}
    for seed in options.seeds:
        for name in options.methods:
            run = options.runs / f"{name.replace(' ', '-')}-seed{seed}"
            if not options.report:
                own = _overrides(name, seed, samples[name], options.data)
                train(run, own, samples[name], options.threads)
            if finished(run, samples[name]):
                curves[name][seed] = _curve(run, costs[name], samples[name])
    curves = {name: found for name, found in curves.items() if found}
    options.out.mkdir(parents=True, exist_ok=True)
    told = {
        name: {"flops_per_image": costs[name].stages, "images": samples[name], "seeds": found}
        for name, found in curves.items()
    }
    (options.out / "vision.json").write_text(json.dumps(told, indent=1) + "\n")
    text = markdown(curves, costs, samples)
    documents.replace(options.markdown, "vision", text)
    print(text)
    plot(curves, options.out / "vision.png")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 0])
    parser.add_argument(
        "--samples", type=int, default=30_720, help="images of the run that leaves nothing out"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data", type=Path, default=Path("datasets/scenes"))
    parser.add_argument("--runs", type=Path, default=Path("runs/vision"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--markdown", type=Path, default=Path("docs/results.md"), help="has marks")
    parser.add_argument("--threads", type=int, default=processors(), help="of the one run at a time")
    parser.add_argument("--report", action="store_true", help="train nothing, show what there is")
    return parser.parse_args()


def _overrides(name: str, seed: int, samples: int, data: Path) -> list[str]:
    judging = ["benchmark=none", "+benchmark.scenes={_target_: longclip.evaluate.Retrieval, split: heldout}"]
    every = [f"judge.every={samples // JUDGED}", f"data.root={data}", f"seed={seed}"]
    return [*MODEL, *METHODS[name], *judging, *every]


def _affordable(whole: Cost, other: Cost, samples: int, batch: int = 64) -> int:
    """How many images of another cost the FLOPs of so many whole ones pay for, in full batches."""
    return round(samples * whole.until(1) / other.until(1) / batch) * batch


def cost(overrides: Sequence[str], data: Path) -> Cost:
    """What an image costs in every stage of a run, counted on its first batches."""
    import hydra
    import torch

    from conf.launch import CONF, instantiate
    from longclip.captions import Groups
    from longclip.towers.image import patch_dropout

    own = [*MODEL, *overrides, f"data.root={data}", "data.workers=0"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", own)
    torch.manual_seed(0)
    tower, curriculum = instantiate(config.model), instantiate(config.curriculum)
    groups = Groups(instantiate(config.recipe.captions), seed=0)
    source = instantiate(
        config.data, groups=groups, tokenizer=tower.tokenizer,
        preprocess=tower.preprocess_cfg, curriculum=curriculum,
    )  # fmt: skip
    source.prepare_data()
    kinds = (curriculum.image_size, curriculum.context_length, curriculum.patch_dropout)
    stages = []
    for share in sorted({float(start) for steps in kinds for start, _ in steps or ()} | {0.0}):
        position = round(share * curriculum.samples)
        source.resume(position, 0)
        patch_dropout(tower.backbone.visual).prob = curriculum.at(position).patch_dropout or 0.0
        batches = iter(source.train_dataloader())
        counted = [next(batches) for _ in range(BATCHES)]
        total = sum(flops(partial(_step, tower, batch, groups.slots)) for batch in counted)
        stages.append((share, total / sum(len(batch.keys) for batch in counted)))
    return Cost(stages)


def _step(tower: Any, batch: Any, slots: dict[str, slice]) -> None:
    found = tower(batch, slots, frozenset({"patches"}))
    (found.image_BE.sum() + found.text_BKE.sum() + found.patches_BPE.sum()).backward()


def _curve(run: Path, found: Cost, samples: int) -> Curve:
    return [
        (
            samples * found.until(min(1.0, row["samples_seen"] / samples)),
            (row["scenes/long/i2t_r1"] + row["scenes/long/t2i_r1"]) / 2,
        )
        for _, row in sorted({row["samples_seen"]: row for row in runs.judgements(run)}.items())
    ]


def reached(curve: Curve, level: float) -> float | None:
    """FLOPs at which R@1 first passes a level, on straight lines between judgements; None: never."""
    for (before, low), (after, high) in pairwise(curve):
        if low < level <= high:
            return before + (after - before) * (level - low) / (high - low)
    return None


def markdown(curves: dict[str, dict[int, Curve]], costs: dict[str, Cost], samples: dict[str, int]) -> str:
    """A table by method: what an image costs, how many there were, R@1, and the compute to reach a level."""
    heads = ["method", "GFLOP an image", "images", "R@1 at half", "R@1 at the end"]
    heads += [f"TFLOP to {level} %" for level in LEVELS]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, seeds in curves.items():
        ends, halves = [c[-1][1] for c in seeds.values()], [_at(c, c[-1][0] / 2) for c in seeds.values()]
        needed = [[reached(curve, level) for curve in seeds.values()] for level in LEVELS]
        cells = [
            name,
            f"{costs[name].until(1) / 1e9:.3f}",
            f"{samples[name]:,}",
            _spread(halves),
            _spread(ends),
        ]
        cells += [", ".join("-" if x is None else f"{x / 1e12:.1f}" for x in found) for found in needed]
        lines.append("| " + " | ".join(cells) + " |")
    seeds_told = ", ".join(str(seed) for seed in next(iter(curves.values()), {}))
    lines += [
        "",
        "R@1 of whole captions on 500 held-out scenes in %, mean of both directions; seeds "
        f"{seeds_told} in brackets, without brackets the first alone.",
    ]
    return "\n".join(lines) + "\n"


def _at(curve: Curve, amount: float) -> float:
    """R@1 after so many FLOPs, on straight lines between judgements."""
    for (before, low), (after, high) in pairwise(curve):
        if before <= amount <= after:
            return low + (high - low) * (amount - before) / max(after - before, 1)
    return curve[-1][1]


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def plot(curves: dict[str, dict[int, Curve]], path: Path) -> None:
    """One picture a seed: R@1 against the FLOPs spent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seeds = list(dict.fromkeys(seed for found in curves.values() for seed in found)) or [0]
    size = (5 * len(seeds) + 2, 4)
    figure, panels = plt.subplots(
        1, len(seeds), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, seed in zip(panels[0], seeds, strict=True):
        for number, (name, found) in enumerate(curves.items()):
            if seed in found:
                spent, r1 = zip(*found[seed], strict=True)
                label = name if axes is panels[0][0] else None
                axes.plot([x / 1e12 for x in spent], r1, "o-", ms=3, color=f"C{number}", label=label)
        axes.set(title=f"seed {seed}", xlabel="TFLOP of both towers", ylim=(0, 101))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("R@1 of whole captions, mean of both directions (%)")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
