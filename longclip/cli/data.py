"""Commands about data: `shards`, `sidecar`, `embed`, `preview`, `doctor`."""

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


def sidecar_command(commands: Any) -> None:
    sidecar = commands.add_parser("sidecar", help="facts about samples -> a store that training joins by key")
    sidecar.add_argument("source", type=Path, help=".jsonl, .csv, .parquet, .npz, or shards, for their meta")
    sidecar.add_argument("--out", type=Path, required=True, help="the folder to make")
    sidecar.add_argument("--key", default="key", help="the column with the samples' keys; default: key")
    sidecar.add_argument("--columns", nargs="+", help="which to take; default: all")
    sidecar.add_argument("--labels", nargs="+", default=[], help="columns of words that are no captions")
    sidecar.add_argument(
        "--neighbours", nargs="+", default=[], help="columns of lists of keys; they become labels of groups"
    )
    sidecar.add_argument(
        "--splitter", default="syntok", choices=["syntok", "dreamlip"], help="finds sentences"
    )
    sidecar.add_argument("--workers", type=int, default=1, help="processes that tokenise; default: 1")
    sidecar.add_argument("--model", default="ViT-B-16", help="the architecture whose tokenizer makes the ids")
    sidecar.set_defaults(run=_sidecar)


def embed_command(commands: Any) -> None:
    embed = commands.add_parser("embed", help="shards through a model -> a side-car of teacher embeddings")
    embed.add_argument("model", help="the teacher: a run, .ckpt, export, hf-hub: or ARCHITECTURE/TAG")
    embed.add_argument("shards", help="a folder of them")
    embed.add_argument("--out", type=Path, required=True, help="the side-car's folder, made here")
    embed.add_argument("--name", default="teacher", help="of its columns, NAME_image and NAME_text")
    embed.add_argument(
        "--source", dest="sources", action="append", default=[], metavar="NAME",
        help="whose captions, where an image has several; can be given again, for a column each",
    )  # fmt: skip
    embed.add_argument("--device", help="default: a GPU where there is one")
    embed.add_argument("--batch-size", type=int, default=64, help="images embedded at once; default: 64")
    embed.set_defaults(run=_embed)


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


def _sidecar(options: argparse.Namespace) -> None:
    from ..data.sidecars.writer import write_sidecar
    from ..towers import configs

    report = write_sidecar(
        options.source,
        options.out,
        configs.tokenizer(options.model),
        key=options.key,
        columns=options.columns,
        labels=options.labels,
        neighbours=options.neighbours,
        splitter=options.splitter,
        processes=options.workers,
    )
    print(f"{options.out}: {report.rows:,} rows")
    for name, kind in report.kinds.items():
        print(f"  {name}: {kind}, {report.missing[name]:,} rows without a value")
    print(
        f"next: data.sidecar.stores=[{options.out}], then filter, weight, scores or columns of data.sidecar"
    )


def _embed(options: argparse.Namespace) -> None:
    from ..embedding import embed
    from ..search import session

    with session.progress() as progress:
        report = embed(
            options.model,
            options.shards,
            options.out,
            progress,
            name=options.name,
            sources=options.sources,
            device=options.device,
            batch_size=options.batch_size,
        )
    columns, (root, _, folder) = [report.image, *report.texts], options.shards.rstrip("/").rpartition("/")
    print(f"{options.out}: {report.written.rows:,} images, {report.damaged:,} damaged ones left out")
    for column in report.texts:
        print(f"  {column}: {report.written.missing[column]:,} images without such a caption")
    print(f"  captions were read up to {report.context_length} tokens")
    print(
        f"next: python train.py recipe=mobileclip2 data=shards data.root={root or '.'} data.train={folder} "
        f"data.sidecar.stores=[{options.out}] data.sidecar.columns=[{','.join(columns)}] "
        f"recipe.terms.distilled.teachers.first.scale={report.scale:.4g}"
    )
