"""Commands about what lies beside the data: `sidecar`, `embed`, `facets`, `cluster`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


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
    embed.add_argument("--images-only", action="store_true", help="no captions: for model.cached.image")
    embed.add_argument(
        "--before-projection", action="store_true",
        help="images only, as their tower's last matrix meets them: model.cached.image, recipe=projectors",
    )  # fmt: skip
    embed.add_argument("--device", help="default: a GPU where there is one")
    embed.add_argument("--batch-size", type=int, default=64, help="images embedded at once; default: 64")
    embed.set_defaults(run=_embed)


def facets_command(commands: Any) -> None:
    facets = commands.add_parser(
        "facets", help="captions of shards through a language model -> a side-car for recipe=flame"
    )
    facets.add_argument("model", help="a language model that transformers opens: a folder or a name")
    facets.add_argument("shards", help="a folder of them")
    facets.add_argument("--out", type=Path, required=True, help="the side-car's folder, made here")
    facets.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="one a line, {caption} where the caption belongs; default: seven of longclip's",
    )  # fmt: skip
    facets.add_argument(
        "--pool", choices=["last", "mean"], default="last",
        help="last: of a model that writes on; mean: of an encoder of sentences; default: last",
    )  # fmt: skip
    facets.add_argument("--source", metavar="NAME", help="whose captions, where an image has several")
    facets.add_argument("--device", help="default: a GPU where there is one")
    facets.add_argument("--batch-size", type=int, default=8, help="captions read at once; default: 8")
    facets.set_defaults(run=_facets)


def cluster_command(commands: Any) -> None:
    cluster = commands.add_parser(
        "cluster", help="a side-car's vectors -> a side-car of labels, of look-alikes"
    )
    cluster.add_argument("source", type=Path, help="the side-car")
    cluster.add_argument("--out", type=Path, required=True, help="the folder to make")
    cluster.add_argument("--column", default="teacher_image", help="of vectors; default: teacher_image")
    cluster.add_argument("--count", type=int, default=9, help="clusters; default: 9")
    cluster.add_argument(
        "--within", type=Path, nargs="+", default=[], metavar="DIR",
        help="labels of earlier stages, inside which clusters are made",
    )  # fmt: skip
    cluster.set_defaults(run=_cluster)


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
    if told := [name for name, kind in report.kinds.items() if kind == "captions"]:
        print(
            f"training shows the texts of {', '.join(told)} as captions; where they are none, remove "
            f"{options.out} and make it with --labels {' '.join(told)}, or with --columns for others alone"
        )
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
            images_only=options.images_only,
            before_projection=options.before_projection,
        )
    where = _where(options)
    print(f"{options.out}: {report.written.rows:,} images, {report.damaged:,} damaged ones left out")
    if not report.texts:
        recipe = "projectors" if options.before_projection else "lit"
        print(f"  {report.image}: for runs that begin with the weights of {options.model}")
        print(f"next: python train.py recipe={recipe} {where} model.cached.image={report.image}")
        return
    for column in report.texts:
        print(f"  {column}: {report.written.missing[column]:,} images without such a caption")
    print(f"  captions were read up to {report.context_length} tokens")
    values = {"image": report.image, "text": report.texts[0], "scale": f"{report.scale:.4g}"}
    teacher = [f"recipe.terms.distilled.teachers.first.{key}={value}" for key, value in values.items()]
    shown = [f"+recipe.captions.long.source={source}" for source in options.sources[:1]]
    print(
        f"next: python train.py recipe=mobileclip2 {where} "
        f"data.sidecar.columns=[{','.join([report.image, *report.texts])}]",
        *teacher,
        *shown,
    )


def _facets(options: argparse.Namespace) -> None:
    from .. import facets
    from ..search import session

    prompts = options.prompts.read_text("utf-8").splitlines() if options.prompts else facets.PROMPTS
    with session.progress() as progress:
        report = facets.facets(
            options.model,
            options.shards,
            options.out,
            progress,
            prompts=[prompt for prompt in prompts if prompt.strip()],
            source=options.source,
            pool=options.pool,
            device=options.device,
            batch_size=options.batch_size,
        )
    missing = report.written.missing[facets.COLUMN]
    print(f"{options.out}: {report.written.rows:,} images, {report.damaged:,} damaged ones left out")
    print(
        f"  {facets.COLUMN}: {report.facets} x {report.width} numbers an image, {missing:,} without a caption"
    )
    print(f"  {report.cut:,} captions were longer than the model reads and lost their last sentences")
    print(
        f"next: python train.py recipe=flame {_where(options)} "
        f"recipe.terms.facets.facets={report.facets} recipe.terms.facets.width={report.width}"
    )


def _where(options: argparse.Namespace) -> str:
    """Overrides that train on these shards with this side-car."""
    root, _, folder = options.shards.rstrip("/").rpartition("/")
    return f"data=shards data.root={root or '.'} data.train={folder} data.sidecar.stores=[{options.out}]"


def _cluster(options: argparse.Namespace) -> None:
    from ..data.sidecars.clusters import COLUMN, cluster

    found = cluster(options.source, options.column, options.out, options.count, options.within)
    print(
        f"{options.out}: {found.labels:,} clusters of {found.smallest:,} to {found.largest:,} samples, "
        f"{found.missing:,} of {found.rows:,} rows without one"
    )
    print(
        f"next: python train.py recipe=mcl model=vit_b16 data.sidecar.stores=[{options.out}], or "
        f"data.plan.batches={COLUMN} with any recipe"
    )
