"""Commands about data: `shards`, `preview`, `doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..types import UserError


def shards_command(commands: Any) -> None:
    shards = commands.add_parser("shards", help="images and captions, however laid out -> tar shards")
    shards.add_argument("source", help="a folder, a tar, a listing, or a pattern such as 'cc3m/*.tar'")
    names = ", ".join(
        path.stem for path in sorted((Path(__file__).parents[1] / "data/converting/layouts").glob("*.yaml"))
    )
    shards.add_argument("--layout", default="jsonl", help=f"{names}; or your own YAML; default: jsonl")
    shards.add_argument("--out", type=Path, required=True, help="one folder of shards per split is made here")
    shards.add_argument("--images", help="where image paths begin; default: beside the listing")
    shards.add_argument("--held-out", type=int, help="entries at the start that go to the split `test`")
    shards.add_argument("--samples-per-shard", type=int, default=1000, help="default: 1000")
    shards.add_argument("--workers", type=int, help="processes; default: one for each processor")
    shards.add_argument("--dry-run", action="store_true", help="look at the first entries, write nothing")
    shards.add_argument(
        "--splitter", default="syntok", choices=["syntok", "dreamlip"], help="finds sentences"
    )
    shards.add_argument("--max-faults", type=float, default=0.01, help="stop above this share of bad entries")
    shards.add_argument("--follow-links", action="store_true", help="admit links that lead out of the source")
    shards.add_argument("--model", default="ViT-B-16", help="the architecture whose tokenizer makes the ids")
    shards.set_defaults(run=_shards)


def preview_command(commands: Any) -> None:
    preview = commands.add_parser("preview", help="an HTML page of samples as training shows them")
    preview.add_argument("source", help="a folder of shards")
    preview.add_argument(
        "--recipe",
        default="long",
        help="a name in conf/recipe, a YAML file, or a run directory; default: long",
    )
    preview.add_argument("--out", type=Path, default=Path("preview.html"), help="default: preview.html")
    preview.add_argument("--count", type=int, default=12, help="images, spread over the data; default: 12")
    preview.add_argument("--epoch", type=int, default=0, help="whose crops and texts; default: 0")
    preview.add_argument("--progress", type=float, default=0.0, help="share of the run done, for schedules")
    preview.add_argument("--model", help="an architecture; default: what the recipe says, or ViT-B-16")
    preview.set_defaults(run=_preview)


def doctor_command(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor", help="what is wrong with this machine or this data, and what to type"
    )
    doctor.add_argument("--data", nargs="+", default=[], metavar="DIR", help="shards that train")
    doctor.add_argument("--benchmarks", nargs="+", default=[], metavar="DIR", help="shards that judge")
    doctor.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept; default: runs")
    doctor.add_argument("--model", default="ViT-B-16", help="whose tokenizer the shards should have")
    doctor.add_argument("--deep", action="store_true", help="read every byte of the shards as well")
    doctor.set_defaults(run=_doctor)


def _shards(options: argparse.Namespace) -> None:
    from ..data.converting.journal import NAME
    from ..data.converting.layouts import Source, load
    from ..data.converting.prepare import Prepare
    from ..data.converting.survey import describe, survey
    from ..data.converting.workers import processors
    from ..towers import configs

    layout = load(options.layout, options.held_out)
    source = Source(options.source, layout, options.images, options.follow_links)
    tokenizer, workers = configs.tokenizer(options.model), options.workers or processors()
    if options.dry_run or not (options.out / NAME).exists():
        seen = survey(source, Prepare(tokenizer, options.splitter), workers)
        print(describe(seen, options.samples_per_shard), flush=True)
    if not options.dry_run:
        _convert(options, source, tokenizer, workers)


def _convert(options: argparse.Namespace, source: Any, tokenizer: Any, workers: int) -> None:
    from ..data.converting import progress
    from ..data.converting.convert import convert

    try:
        with progress.shown() as step:
            report = convert(
                source,
                options.out,
                tokenizer=tokenizer,
                samples_per_shard=options.samples_per_shard,
                splitter=options.splitter,
                max_faults=options.max_faults,
                workers=workers,
                progress=step,
            )
    except KeyboardInterrupt:
        raise UserError(
            "interrupted; run the same command again to go on: finished shards are kept"
        ) from None
    print(report)
    print(f"next: python train.py data=shards data.root={options.out} benchmark=shards name=NAME")


def _preview(options: argparse.Namespace) -> None:
    from ..preview import preview
    from ..preview.look import Moment

    written = preview(
        options.source,
        options.recipe,
        options.out,
        count=options.count,
        moment=Moment(options.epoch, options.progress),
        architecture=options.model,
    )
    print(written)


def _doctor(options: argparse.Namespace) -> int:
    from ..doctor import examine

    return examine(options.data, options.benchmarks, options.runs, model=options.model, deep=options.deep)
