"""Fine-tuning from pretrained, at small scale: one CLIP of 77 tokens, then every recipe from that checkpoint.

    python -m benchmarks.finetuning --jobs 2                             # the embedded scenes, three seeds
    python -m benchmarks.finetuning --mosaics datasets/mosaics --photos datasets/flickr8k --model photos
    python -m benchmarks.finetuning --report                             # no training: what is there so far

A small CLIP learns short captions at 77 tokens: texts of one to three sentences of the scenes, or captions of
the photos that a folder of mosaics is made of (`benchmarks.mosaics`). Its positions are then stretched to 248
tokens, and every recipe trains on long captions from there, all on the same images in the same order. Those
that need weights, which `benchmarks.recipes` leaves out, train once more on as many images as `long`'s FLOPs
pay for (--flops names others). `tulip` is two runs, each on half of the images.
Told are what is gained on long captions and lost on brief ones, and both for models on the way from the start
to the fine-tuned one (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903; `longclip average`).
A run that is there is not repeated. Writes docs/finetuning-NAME.{json,png} and the table in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from longclip import recipes, runs
from longclip.data.converting.workers import processors
from longclip.types import UserError

from . import documents
from .gains import Between, Told, markdown, plot
from .recipe_costs import cost
from .recipes import SAME, Variants, affordable, alike, beginners
from .trainings import (
    Job,
    Numbers,
    collect,
    directory,
    equipped,
    finished,
    options_parser,
    run_all,
    train,
)  # fmt: skip

SHARES = (0.25, 0.5, 0.75)
"""Of the fine-tuned model, in the models between it and the start."""

SHORT = [
    "recipe=captions",
    "recipe.captions.each._target_=longclip.captions.Merged",
    "recipe.captions.each.count=4",
    "+recipe.captions.each.most=3",
]
"""Pretraining on scenes: four texts of one to three sentences each."""


SECOND: Variants = {
    "tulip": [
        "recipe=long",
        "+recipe.captions.short={_target_: longclip.captions.First}",
        "+recipe.terms.short={_target_: longclip.objectives.Contrastive, texts: short}",
    ]
}
"""Recipes of two runs: how the second trains, which goes on from the first."""

BATCH = 64


class Setting(NamedTuple):
    """Data and models: what all runs share."""

    name: str  # of the benchmark that judges, too
    pretrained: Path  # the run that all begin from
    every: list[str]  # overrides of all fine-tuning
    start: list[str]  # those that begin it from the pretrained model
    before: list[str]  # of pretraining


def main() -> None:
    options = _options()
    setting = _setting(options)
    if not options.report:
        before = [*setting.before, "seed=0", "export=open_clip"]
        train(setting.pretrained, before, options.pretrain, processors())
    told = _told(options, setting)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"finetuning-{setting.name}"
    documents.figures(options.out / f"{name}.json", told._asdict())
    text = markdown(setting.name, told)
    documents.replace(options.markdown, name, text)
    plot(setting.name, told, options.out / f"{name}.png")
    print(text)


def _told(options: argparse.Namespace, setting: Setting) -> Told:
    """Train what is missing, and collect everything."""
    chosen = {name: [f"recipe={name}"] for name in dict.fromkeys(["long", *options.recipes])}
    variants = equipped(chosen, options.sidecars, options.own)
    whole = _cost("long", variants["long"])
    costs = {name: _cost(name, own) / whole for name, own in variants.items()}
    same = {name for name, ratio in costs.items() if alike(1 / ratio)}
    other = [name for name in variants if name in options.flops and name not in same]
    paid = {name: affordable(1, costs[name], options.samples, BATCH) for name in other}
    steps = list(_jobs(variants, dict.fromkeys(variants, options.samples), setting, options))
    flops = list(_jobs(variants, paid, setting, options, "-flops"))
    finish = collect if options.report else partial(run_all, at_once=options.jobs)
    found, more = finish(steps), finish(flops)
    between = _between(steps, setting, [] if options.report else options.between)
    more |= {name: found[name] for name in found if name in same}
    return Told(_start(steps), found, between, more, costs)


def _options() -> argparse.Namespace:
    parser = options_parser(__doc__)
    parser.add_argument("--mosaics", help="shards of benchmarks.mosaics; default: the embedded scenes")
    parser.add_argument("--photos", help="shards of the photos that they are made of, to pretrain on")
    parser.add_argument(
        "--scenes", default="datasets/scenes", help="where the embedded scenes are, or are made"
    )
    parser.add_argument("--model", default="scenes", help="a name in conf/model")
    parser.add_argument("--pretrain", type=int, default=19_200, help="images; 38,400 are few for photos")
    parser.add_argument("--samples", type=int, default=3_200, help="images of a fine-tuning")
    parser.add_argument("--lr", type=float, default=3e-4, help="of fine-tuning")
    known = recipes.names()
    need_weights = sorted({*known} - {*beginners(), *SAME})
    parser.add_argument("--recipes", nargs="+", choices=known, default=known)
    parser.add_argument("--between", nargs="*", choices=known, default=known, help="WiSE-FT for these alone")
    parser.add_argument(
        "--flops", nargs="*", choices=known, default=need_weights, help="at equal FLOPs, too: these alone"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/finetuning"))
    return parser.parse_args()


def _setting(options: argparse.Namespace) -> Setting:
    model, short = f"model={options.model}", "model.backbone.context_length=77"
    pretrained = options.runs / ("scenes" if options.mosaics is None else "mosaics") / "start"
    start = [model, "model.backbone.architecture=null"]
    start += [f"model.backbone.weights=local-dir:{pretrained / 'export'}"]
    if options.mosaics is None:
        every = [f"data.root={options.scenes}", "benchmark=compared", *options.overrides]
        return Setting("scenes", pretrained, every, start, [model, *every, *SHORT, short])
    judged = ["benchmark=mosaics", "data.judge=[heldout,photos]"]
    every = ["data=shards", f"data.root={options.mosaics}", *judged, *options.overrides]
    photos = ["experiment=flickr8k", f"data.root={options.photos}"]
    return Setting("mosaics", pretrained, every, start, [model, *every, *photos, short])


def _jobs(
    variants: Variants,
    images: Mapping[str, int],
    setting: Setting,
    options: argparse.Namespace,
    mark: str = "",
) -> Iterator[Job]:
    """One for each recipe of `images`, seed by seed, so that the first one is whole as soon as can be."""
    for seed in options.seeds:
        for name, samples in images.items():
            run = options.runs / setting.name / f"{directory(name)}{mark}-seed{seed}"
            runs_of = 2 if name in SECOND else 1
            every = [*setting.every, f"optim.lr={options.lr}", f"optim.warmup={samples // runs_of // 10}"]
            if name != "long" or mark:
                every.append("judge.start=false")  # all begin from one start, which is judged once
            job = Job(name, seed, run, [*variants[name], *every, *setting.start], samples // runs_of)
            yield _second(job, every) if name in SECOND else job


def _second(first: Job, every: Sequence[str]) -> Job:
    """The run that goes on from another."""
    run = first.run.with_name(f"{first.run.name}-first")
    begin = ["model=run", f"model.backbone.name={run}", "model.backbone.context_length=248"]
    return first._replace(overrides=[*SECOND[first.variant], *every, *begin], first=first._replace(run=run))


def _cost(name: str, own: Sequence[str]) -> float:
    """FLOPs an image, of both runs where there are two."""
    stages = [own, *([SECOND[name]] if name in SECOND else [])]
    return statistics.mean(cost(stage, tellings=1).each for stage in stages)


def _start(jobs: Sequence[Job]) -> Numbers:
    """The start, stretched, as the first run of `long` was judged before its first step."""
    for job in jobs:
        if job.variant == "long" and (start := runs.start(job.run)):
            return start
    raise SystemExit(
        "recipe=long was not judged yet, and all others are told beside its start: train it first"
    )


def _between(jobs: Sequence[Job], setting: Setting, wanted: Sequence[str]) -> Between:
    """Of the first seed of recipes that were fine-tuned; judged once if wanted, and kept beside the run."""
    found: Between = {}
    for job in jobs:
        if job.seed == jobs[0].seed and finished(job.run, job.samples):
            kept = job.run / "between.json"
            if not kept.exists() and job.variant in wanted:
                try:
                    judged = _judged(job, setting)
                except UserError as error:  # experts are no network that the start could be averaged with
                    print(f"{job.variant}: nothing between it and the start: {error}", flush=True)
                    continue
                kept.write_text(json.dumps(judged, indent=1) + "\n")
            if kept.exists():
                found[job.variant] = json.loads(kept.read_text())
    return found


def _judged(job: Job, setting: Setting) -> dict[str, Numbers]:
    """Models between the start and a fine-tuned one, judged on retrieval."""
    import hydra

    from conf.launch import CONF, evaluators, instantiate
    from longclip.averaging import average
    from longclip.evaluate import examine, flat
    from longclip.towers.clip import DualTower

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", [*job.overrides, "data.workers=0"])
    retrieval = (setting.name, f"{setting.name}/photos")
    benchmarks = {name: one for name, one in evaluators(config.benchmark).items() if name in retrieval}
    backbone = config.model.backbone
    found = {}
    for share in SHARES:
        mean = average(
            [str(setting.pretrained / "export"), str(job.run)],
            [1 - share, share],
            backbone.context_length,
            positions=backbone.positions,
            keep=backbone.keep,
        )
        tower = DualTower(mean)
        data = instantiate(
            config.data, groups=None, tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg
        )
        found[str(share)] = flat(examine(tower, data, benchmarks))
    return found


if __name__ == "__main__":
    main()
