"""Fine-tuning from pretrained, at small scale: one CLIP of 77 tokens, then every recipe from that checkpoint.

    python -m benchmarks.finetuning --jobs 2                             # the embedded scenes, three seeds
    python -m benchmarks.finetuning --mosaics datasets/mosaics --photos datasets/flickr8k --model photos
    python -m benchmarks.finetuning --report                             # no training: what is there so far

A small CLIP learns short captions at 77 tokens: texts of one to three sentences of the scenes, or captions of
the photos that a folder of mosaics is made of (`benchmarks.mosaics`). Its positions are then stretched to 248
tokens, and every recipe trains on long captions from there, all on the same images in the same order.
Told are what is gained on long captions and lost on brief ones, and both for models on the way from the start
to the fine-tuned one (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903; `longclip average`).
A run that is there is not repeated. Writes docs/finetuning-NAME.{json,png} and the table in docs/recipes.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from longclip import recipes, runs
from longclip.data.converting.workers import processors

from . import documents
from .trainings import (
    Found,
    Job,
    Numbers,
    cell,
    collect,
    directory,
    finished,
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

TELLS = """The first line is the pretrained model with its positions stretched: R@1 in %, mean of both
directions. All others are points above or below it, mean over seeds (lowest to highest). Brief: the caption
cut at 40 tokens. Lost to order: points of R@1 that go when the first sentence moves to place 4, and when all
are shuffled, mean of both. Half way: the mean of the weights of the start and of the first seed's model."""


class Setting(NamedTuple):
    """Data and model: what all runs share."""

    name: str  # of the benchmark that judges, too
    tuning: list[str]  # overrides of fine-tuning
    before: list[str]  # of pretraining

    def columns(self) -> dict[str, tuple[str, ...]]:
        """Column -> the numbers that it is the mean of."""
        ways = ("i2t_r1", "t2i_r1")
        return {
            "long": tuple(f"{self.name}/long/{way}" for way in ways),
            "brief": tuple(f"{self.name}/length/40/{way}" for way in ways),
            "first sentence": tuple(f"{self.name}/short/{way}" for way in ways),
            "lost to order": tuple(f"{self.name}/diagnostics/order/{d}/lost" for d in ("moved", "shuffled")),
            "swaps": (f"{self.name}/swaps/accuracy",),
            "pointing": (f"{self.name}/pointing/accuracy",),
        }


Between = dict[str, dict[str, Numbers]]
"""Recipe -> share of the fine-tuned model -> what the model between it and the start was judged to be."""


class Told(NamedTuple):
    """All that was found."""

    start: Numbers
    found: Found
    between: Between


def main() -> None:
    options = _options()
    setting = _setting(options)
    pretrained = options.runs / setting.name / "start"
    if not options.report:
        train(pretrained, [*setting.before, "seed=0", "export=open_clip"], options.pretrain, processors())
    jobs = list(_jobs(options, setting, pretrained))
    found = collect(jobs) if options.report else run_all(jobs, options.jobs)
    told = Told(_start(jobs), found, _between(jobs, pretrained, setting, options.report))
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"finetuning-{setting.name}"
    (options.out / f"{name}.json").write_text(json.dumps(told._asdict(), indent=1) + "\n")
    text = markdown(setting, told)
    documents.replace(options.markdown, name, text)
    plot(setting, told, options.out / f"{name}.png")
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mosaics", help="shards of benchmarks.mosaics; default: the embedded scenes")
    parser.add_argument("--photos", help="shards of the photos that they are made of, to pretrain on")
    parser.add_argument(
        "--scenes", default="datasets/scenes", help="where the embedded scenes are, or are made"
    )
    parser.add_argument("--model", default="scenes", help="a name in conf/model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain", type=int, default=19_200, help="images")
    parser.add_argument("--samples", type=int, default=3_200, help="images of a fine-tuning")
    parser.add_argument("--lr", type=float, default=3e-4, help="of fine-tuning")
    parser.add_argument("--recipes", nargs="+", choices=recipes.names(), default=recipes.names())
    parser.add_argument(
        "--sidecars", nargs="+", default=[], metavar="RECIPE=STORE", help="for those that read"
    )
    parser.add_argument(
        "--overrides", nargs="+", default=[], metavar="KEY=VALUE", help="of train.py, for all"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, each on its share of cores")
    parser.add_argument("--report", action="store_true", help="train nothing, show what there is")
    parser.add_argument("--runs", type=Path, default=Path("runs/finetuning"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--markdown", type=Path, default=Path("docs/recipes.md"), help="has marks")
    return parser.parse_args()


def _setting(options: argparse.Namespace) -> Setting:
    every, short = [f"model={options.model}", *options.overrides], "model.backbone.context_length=77"
    if options.mosaics is None:
        every += [f"data.root={options.scenes}", "benchmark=compared"]
        return Setting("scenes", every, [*every, *SHORT, short])
    tuning = ["data=shards", f"data.root={options.mosaics}", "data.judge=[heldout]", "benchmark=mosaics"]
    photos = ["data=shards", f"data.root={options.photos}", "data.judge=[dev]", "benchmark=shards"]
    return Setting("mosaics", [*every, *tuning], [*every, *photos, "recipe=captions", short])


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


def _between(jobs: Sequence[Job], pretrained: Path, setting: Setting, report: bool) -> Between:
    """Of the first seed of every recipe that was fine-tuned; judged once, and kept beside the run."""
    found: Between = {}
    for job in jobs:
        if job.seed == jobs[0].seed and finished(job.run, job.samples):
            kept = job.run / "between.json"
            if not kept.exists() and not report:
                kept.write_text(json.dumps(_judged(job, pretrained, setting), indent=1) + "\n")
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
    benchmarks = {setting.name: evaluators(config.benchmark)[setting.name]}
    length = config.model.backbone.context_length
    found = {}
    for share in SHARES:
        mean = average([str(pretrained / "export"), str(job.run)], [1 - share, share], length)
        tower = DualTower(mean)
        data = instantiate(
            config.data, groups=None, tokenizer=tower.tokenizer, preprocess=tower.preprocess_cfg
        )
        found[str(share)] = flat(examine(tower, data, benchmarks))
    return found


def markdown(setting: Setting, told: Told) -> str:
    """What every recipe gains and loses, and so the model half way to it."""
    columns = setting.columns()
    head = ["recipe", *columns, "half way: long", "half way: brief"]
    lines = [["the start", *(cell({0: told.start}, names) for names in columns.values()), "-", "-"]]
    ranked = sorted(told.found.items(), key=lambda pair: -_mean(pair[1].values(), columns["long"]))
    for name, seeds in ranked:
        half = {0: told.between[name]["0.5"]} if name in told.between else {}
        ways = [cell(half, columns[column], told.start) for column in ("long", "brief")]
        lines.append([name, *(cell(seeds, names, told.start) for names in columns.values()), *ways])
    picture = f"![R@1 of brief and of whole captions, recipe by recipe](finetuning-{setting.name}.png)"
    return "\n\n".join([documents.table(head, lines), TELLS, picture])


def _mean(seeds: Iterable[Numbers], names: Sequence[str]) -> float:
    return statistics.mean(numbers[name] for numbers in seeds for name in names)


def plot(setting: Setting, told: Told, path: Path) -> None:
    """Every recipe's way from the start: R@1 of brief captions across, of whole ones upwards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = setting.columns()
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for number, (name, seeds) in enumerate(told.found.items()):
        steps = [[numbers] for numbers in told.between.get(name, {}).values()]
        way = [[told.start], *steps, list(seeds.values())]
        brief, long = ([_mean(one, columns[column]) for one in way] for column in ("brief", "long"))
        axes.plot(brief, long, "-", color=f"C{number % 10}", alpha=0.5, linewidth=1)
        axes.plot(brief[-1:], long[-1:], "osD^v"[number // 10 % 5], color=f"C{number % 10}", label=name)
    axes.set(xlabel="R@1 of captions cut at 40 tokens (%)", ylabel="R@1 of whole captions (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
