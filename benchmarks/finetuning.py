"""Fine-tuning from pretrained, at small scale: one CLIP of 77 tokens, then every recipe from that checkpoint.

    python -m benchmarks.finetuning --jobs 2                             # the embedded scenes, three seeds
    python -m benchmarks.finetuning --mosaics datasets/mosaics --photos datasets/flickr8k --model photos
    python -m benchmarks.finetuning --report                             # no training: what is there so far

A small CLIP learns short captions at 77 tokens: texts of one to three sentences of the scenes, or captions of
the photos that a folder of mosaics is made of (`benchmarks.mosaics`). Its positions are then stretched to 248
tokens, and every recipe trains on long captions from there, all on the same images in the same order.
Told are what is gained on long captions and lost on brief ones, and both for models on the way from the start
to the fine-tuned one (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903; `longclip average`).
A run that is there is not repeated. Writes docs/finetuning-NAME.{json,png} and the table in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from longclip import recipes, runs
from longclip.data.converting.workers import processors
from longclip.types import UserError

from . import documents
from .gains import Between, Told, markdown, plot
from .trainings import (
    Job,
    Numbers,
    collect,
    directory,
    finished,
    options_parser,
    run_all,
    train,
    with_sidecars,
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


class Setting(NamedTuple):
    """Data and model: what all runs share."""

    name: str  # of the benchmark that judges, too
    tuning: list[str]  # overrides of fine-tuning
    before: list[str]  # of pretraining


def main() -> None:
    options = _options()
    setting = _setting(options)
    pretrained = options.runs / setting.name / "start"
    if not options.report:
        train(pretrained, [*setting.before, "seed=0", "export=open_clip"], options.pretrain, processors())
    jobs = list(_jobs(options, setting, pretrained))
    found = collect(jobs) if options.report else run_all(jobs, options.jobs)
    wanted = [] if options.report else options.between
    told = Told(_start(jobs), found, _between(jobs, pretrained, setting, wanted))
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"finetuning-{setting.name}"
    (options.out / f"{name}.json").write_text(json.dumps(told._asdict(), indent=1) + "\n")
    text = markdown(setting.name, told)
    documents.replace(options.markdown, name, text)
    plot(setting.name, told, options.out / f"{name}.png")
    print(text)


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
    parser.add_argument("--recipes", nargs="+", choices=known, default=known)
    parser.add_argument("--between", nargs="*", choices=known, default=known, help="WiSE-FT for these alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/finetuning"))
    return parser.parse_args()


def _setting(options: argparse.Namespace) -> Setting:
    every, short = [f"model={options.model}", *options.overrides], "model.backbone.context_length=77"
    if options.mosaics is None:
        every += [f"data.root={options.scenes}", "benchmark=compared"]
        return Setting("scenes", every, [*every, *SHORT, short])
    judged = ["benchmark=mosaics", "data.judge=[heldout,photos]"]
    tuning = ["data=shards", f"data.root={options.mosaics}", *judged]
    photos = ["experiment=flickr8k", f"data.root={options.photos}"]
    return Setting("mosaics", [*every, *tuning], [*every, *photos, short])


def _jobs(options: argparse.Namespace, setting: Setting, pretrained: Path) -> Iterator[Job]:
    """Seed by seed, so that the first one is whole as soon as can be."""
    variants = with_sidecars(
        {name: [f"recipe={name}"] for name in dict.fromkeys(["long", *options.recipes])}, options.sidecars
    )
    tuning = [
        "model.backbone.architecture=null",
        f"model.backbone.weights=local-dir:{pretrained / 'export'}",
        f"optim.lr={options.lr}",
        f"optim.warmup={options.samples // 10}",
    ]
    for seed in options.seeds:
        for name, own in variants.items():
            run = options.runs / setting.name / f"{directory(name)}-seed{seed}"
            judged = [] if name == "long" else ["judge.start=false"]  # from one start, which is judged once
            yield Job(name, seed, run, [*own, *setting.tuning, *tuning, *judged], options.samples)


def _start(jobs: Sequence[Job]) -> Numbers:
    """The start, stretched, as the first run of `long` was judged before its first step."""
    for job in jobs:
        if job.variant == "long" and (judged := runs.judgements(job.run)):
            return judged[0]
    raise SystemExit(
        "recipe=long was not judged yet, and all others are told beside its start: train it first"
    )


def _between(jobs: Sequence[Job], pretrained: Path, setting: Setting, wanted: Sequence[str]) -> Between:
    """Of the first seed of recipes that were fine-tuned; judged once if wanted, and kept beside the run."""
    found: Between = {}
    for job in jobs:
        if job.seed == jobs[0].seed and finished(job.run, job.samples):
            kept = job.run / "between.json"
            if not kept.exists() and job.variant in wanted:
                try:
                    judged = _judged(job, pretrained, setting)
                except UserError as error:  # experts are no network that the start could be averaged with
                    print(f"{job.variant}: nothing between it and the start: {error}", flush=True)
                    continue
                kept.write_text(json.dumps(judged, indent=1) + "\n")
            if kept.exists():
                found[job.variant] = json.loads(kept.read_text())
    return found


def _judged(job: Job, pretrained: Path, setting: Setting) -> dict[str, Numbers]:
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
            [str(pretrained / "export"), str(job.run)],
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
