"""The recipes side by side on the embedded scenes, from random weights: at equal steps, and at equal FLOPs.

    python -m benchmarks.recipes --jobs 2                        # every recipe, three seeds
    python -m benchmarks.recipes --seeds 0 --recipes clip long
    python -m benchmarks.recipes --report                        # no training: what is there so far

Every run is `python train.py recipe=... seed=...`; one that is there is not repeated.
FLOPs of a step are those of `benchmarks.recipe_costs` for the scenes' model and captions, loss and heads
included: a recipe that costs more or less than `long` trains once more, on as many images as `long`'s FLOPs
pay for. A recipe that reads a side-car takes part where --sidecars RECIPE=STORE names one. Those that need
weights to begin with are left to `benchmarks.finetuning`; two are `long` where an image has one caption.
Writes docs/recipes.json, docs/recipes.png, docs/recipes-lengths.png and the table in docs/results.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from eval.report import plot_lengths
from longclip import recipes

from . import documents, side_by_side
from .recipe_costs import Cost, cost
from .trainings import Found, Job, cell, collect, curve, directory, equipped, options_parser, run_all

Variants = Mapping[str, Sequence[str]]
"""Name -> overrides of train.py."""

SAME = ("captions", "veclip")
"""As `long` to the last digit where an image has one caption, as a scene does."""

SETTING = ["batch_size=32", "optim.lr=5e-4", "benchmark=compared", "judge.start=false"]
"""At equal images `long` reaches three times the R@1 of batches of 64 or of a rate of 1e-3 (docs/log.md)."""


def beginners() -> list[str]:
    """Recipes that train from random weights."""
    found = (recipes.read(recipes.find(name)) for name in recipes.names() if name not in SAME)
    return [one.name for one in found if "model.backbone.weights" not in one.needs]


HALF = ["recipe.terms.short.k=16"]
"""Of the directions that 32 images have; the papers' 32 would leave nothing out."""

VARIANTS: Variants = {
    **{name: [f"recipe={name}"] for name in beginners()},
    "debias": ["recipe=debias", *HALF],
    "longclip": ["recipe=longclip", *HALF],
    "longclip, no smoothing": [
        "recipe=longclip",
        *HALF,
        "recipe.terms.long.label_smoothing=0",
        "recipe.terms.short.label_smoothing=0",
    ],
    "longclip, no short": ["recipe=longclip", "~recipe.terms.short", "~recipe.captions.short"],
    "dreamlip, no grouping": ["recipe=dreamlip", "~recipe.terms.grouping"],
    "dreamlip, threshold 0.5": ["recipe=dreamlip", "recipe.terms.grouping.threshold=0.5"],
    "dreamlip, sharper": [
        "recipe=dreamlip",
        "recipe.terms.grouping.threshold=0.5",
        "+recipe.terms.raw.margin=0.5",
        "+recipe.terms.raw.label_smoothing=0.1",
    ],
    "grain, margin": ["recipe=grain", "+recipe.terms.long.margin=0.5"],
}

LONG = ("scenes/long/i2t_r1", "scenes/long/t2i_r1")

COLUMNS: dict[str, tuple[str, ...]] = {
    "long i2t": LONG[:1],
    "long t2i": LONG[1:],
    "brief": ("scenes/length/40/i2t_r1", "scenes/length/40/t2i_r1"),
    "first sentence": ("scenes/short/i2t_r1", "scenes/short/t2i_r1"),
    "distractors": ("scenes/distractors/long/i2t_r1", "scenes/distractors/long/t2i_r1"),
    "lost to order": ("scenes/diagnostics/order/moved/lost", "scenes/diagnostics/order/shuffled/lost"),
    "swaps": ("scenes/swaps/accuracy",),
    "pointing": ("scenes/pointing/accuracy",),
}
"""Column -> the numbers that it is the mean of."""

PANELS = {
    "R@1, whole captions": LONG,
    "R@1, cut at 40 tokens": COLUMNS["brief"],
    "R@1 among distractors": COLUMNS["distractors"],
    "swaps told apart": COLUMNS["swaps"],
    "pointing": COLUMNS["pointing"],
}

CURVES = ("clip", "long", "mix", "longclip", "debias", "dreamlip", "betaclip", "hn", "grounded")
"""In the picture of lengths: more lines cannot be told apart."""

TELLS = """R@1 in %, mean over seeds (lowest to highest), of both directions where it does not say which.
Brief: the caption cut at 40 tokens. Lost to order: points of R@1 that go when the first sentence moves to
place 4, and when all are shuffled, mean of both. Effective length: tokens at which 95 % of the R@1 at 248 are
reached."""


def main() -> None:
    options = _options()
    chosen = dict.fromkeys(["long", *options.recipes])  # all others are told beside it
    variants = equipped({name: VARIANTS[name] for name in chosen}, options.sidecars, options.own)
    costs = {name: cost(own, tellings=1) for name, own in variants.items()}
    paying = {} if options.steps_only else variants
    steps = [job for seed in options.seeds for job in at_equal_steps(variants, seed, options)]
    flops = [job for seed in options.seeds for job in at_equal_flops(paying, costs, seed, options)]
    finish = collect if options.report else partial(run_all, at_once=options.jobs)
    found, paid = finish(steps), finish(flops)
    text = markdown(found, paid, {job.variant: job.samples for job in [*steps, *flops]}, costs)
    told = {"steps": found, "flops": paid, "costs": {name: one._asdict() for name, one in costs.items()}}
    options.out.mkdir(parents=True, exist_ok=True)
    documents.figures(options.out / "recipes.json", told)
    curves = {name: curve(found[name], "scenes") for name in CURVES if name in found}
    means, spreads = ({name: one[part] for name, one in curves.items()} for part in (0, 1))
    plot_lengths(means, options.out / "recipes-lengths.png", spreads)
    side_by_side.plot(found, paid, PANELS, options.out / "recipes.png")
    documents.replace(options.markdown, "scenes", text)
    print(text)


def _options() -> argparse.Namespace:
    parser = options_parser(__doc__)
    parser.add_argument("--samples", type=int, default=7_200, help="images of a run at equal steps")
    parser.add_argument("--recipes", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps-only", action="store_true", help="no runs at equal FLOPs")
    parser.add_argument("--data", default="datasets/scenes")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    return parser.parse_args()


def at_equal_steps(variants: Variants, seed: int, options: argparse.Namespace) -> Iterator[Job]:
    """As many images for all."""
    for name, own in variants.items():
        run = options.runs / f"{directory(name)}-seed{seed}"
        yield Job(name, seed, run, [*own, *_setting(options)], options.samples)


def at_equal_flops(
    variants: Variants, costs: Mapping[str, Cost], seed: int, options: argparse.Namespace
) -> Iterator[Job]:
    """As many as `long`'s FLOPs pay for; nothing where that is the run at equal steps."""
    for name, own in variants.items():
        samples = affordable(costs["long"].each, costs[name].each, options.samples)
        if samples != options.samples:
            run = options.runs / f"{directory(name)}-flops-seed{seed}"
            yield Job(name, seed, run, [*own, *_setting(options)], samples)


def _setting(options: argparse.Namespace) -> list[str]:
    return [*SETTING, f"data.root={options.data}", *options.overrides]


def affordable(whole: float, other: float, samples: int, batch: int = 32) -> int:
    """How many images of other FLOPs those of so many whole ones pay for, in full batches.

    As many, where they are alike.
    """
    ratio = whole / other
    return samples if alike(ratio) else round(samples * ratio / batch) * batch


def alike(ratio: float) -> bool:
    """Whether costs are within 15 %: less than what seeds do."""
    return abs(ratio - 1) < 0.15


def markdown(found: Found, paid: Found, images: Mapping[str, int], costs: Mapping[str, Cost]) -> str:
    """Every variant at equal steps, by R@1 of whole captions, and that R@1 at equal FLOPs."""
    head = ["recipe", *COLUMNS, "effective length", "MFLOP an image", "images", "long at equal FLOPs"]
    lines = []
    for name in side_by_side.ranked(found, LONG):
        seeds = found[name]
        cells = [cell(seeds, numbers) for numbers in COLUMNS.values()]
        equal = cell(seeds if images[name] == images["long"] else paid.get(name, {}), LONG)
        spent = costs[name].each / 1e6
        lines.append([name, *cells, f"{_effective(seeds):.0f}", f"{spent:.0f}", f"{images[name]:,}", equal])
    chance = cell(next(iter(found.values()), {}), "scenes/pointing/chance")
    return "\n\n".join([documents.table(head, lines), f"{TELLS} Pointing by chance: {chance}."])


def _effective(seeds: Mapping[int, dict[str, float]]) -> float:
    from longclip.evaluate.diagnostics.lengths import crossing

    return crossing(curve(seeds, "scenes").mean, 0.95)


if __name__ == "__main__":
    main()
