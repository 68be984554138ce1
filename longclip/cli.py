"""`longclip shards | sidecar | search | preview | doctor | average | export | push | import`.

Each command imports what it needs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .types import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one sentence and exit code 2, a doctor's problem is 1."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="longclip", description="Train CLIP on long, detailed captions.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    _shards_command(commands)
    _preview_command(commands)
    _doctor_command(commands)
    _sidecar_command(commands)
    _search_command(commands)

    _average_command(commands)
    _export_command(commands)
    _push_command(commands)

    bring = commands.add_parser("import", help="weights of others -> a folder that open_clip loads")
    bring.add_argument(
        "source",
        help="a file (OpenAI archive, Long-CLIP .pt, open_clip epoch_N.pt ...), a folder of Hugging Face's "
        "CLIPModel, or hf-hub:ORG/NAME",
    )
    bring.add_argument("--out", type=Path, required=True)
    bring.add_argument("--architecture", help="an open_clip name; default: read from the tensors' shapes")
    bring.add_argument(
        "--context-length", type=int, help="stretch the positions to this; default: as they are"
    )
    bring.set_defaults(run=_import)
    return root


def _average_command(commands: Any) -> None:
    mean = commands.add_parser(
        "average", help="the mean of several models' weights -> a folder like any export"
    )
    mean.add_argument(
        "models", nargs="+", help="runs, .ckpt, exports, hf-hub: or ARCHITECTURE/TAG, of one start"
    )
    mean.add_argument("--out", type=Path, required=True, help="the folder to make")
    mean.add_argument(
        "--shares", nargs="+", type=float, help="of each, adding up to 1; default: all the same"
    )
    mean.add_argument(
        "--context-length", type=int, help="stretch shorter positions to this; default: to those of the last"
    )
    mean.add_argument("--weights", choices=["ema", "raw"], help="of checkpoints, as in export")
    mean.set_defaults(run=_average)


def _export_command(commands: Any) -> None:
    export = commands.add_parser("export", help="a model -> a checked folder for other libraries")
    export.add_argument("source", help="a run, .ckpt, export, hf-hub: or ARCHITECTURE/TAG")
    export.add_argument("--out", type=Path, required=True, help="the folder to make")
    export.add_argument(
        "--format",
        default="open_clip",
        choices=["open_clip", "hf", "hf-vision", "hf-text", "clip_l", "onnx"],
        help="hf: CLIPModel; hf-vision: LLaVA; hf-text: diffusers; clip_l: ComfyUI; default: open_clip",
    )
    export.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="default: fp32")
    export.add_argument(
        "--weights", choices=["ema", "raw"], help="of a checkpoint; default: the averages where it has them"
    )
    export.set_defaults(run=_export)


def _push_command(commands: Any) -> None:
    push = commands.add_parser("push", help="an export -> a model hub; nothing else sends anything")
    push.add_argument("folder", type=Path, help="what `longclip export` made")
    push.add_argument("repository", help="OWNER/NAME; made where it is not there yet")
    push.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    push.add_argument("--endpoint", help="another hub's address; default: Hugging Face, or HF_ENDPOINT")
    push.set_defaults(run=_push)


def _shards_command(commands: Any) -> None:
    shards = commands.add_parser("shards", help="images and captions, however laid out -> tar shards")
    shards.add_argument("source", help="a folder, a tar, a listing, or a pattern such as 'cc3m/*.tar'")
    names = ", ".join(
        path.stem for path in sorted((Path(__file__).parent / "data/converting/layouts").glob("*.yaml"))
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


def _sidecar_command(commands: Any) -> None:
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


def _search_command(commands: Any) -> None:
    search = commands.add_parser("search", help="pictures of a folder by long descriptions")
    search.add_argument("folder", type=Path, help="JPEG, PNG and WebP files, however deep")
    search.add_argument("--query", help="a description; without one: a line of standard input each")
    search.add_argument("--model", required=True, help="a run, .ckpt, export, hf-hub: or ARCHITECTURE/TAG")
    search.add_argument("--top", type=_positive, default=12, help="pictures to show; default: 12")
    search.add_argument("--serve", action="store_true", help="a page in the browser, with heat maps")
    search.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine only")
    search.add_argument("--port", type=int, default=8600, help="default: 8600; 0: any free one")
    search.add_argument("--cache", type=Path, help="keeps embeddings; default: ~/.cache/longclip/search")
    search.add_argument("--device", help="default: a GPU where there is one")
    search.add_argument(
        "--batch-size", type=_positive, default=32, help="pictures embedded at once; default: 32"
    )
    search.add_argument("--workers", type=_positive, default=2, help="threads that read pictures; default: 2")
    search.set_defaults(run=_search)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _preview_command(commands: Any) -> None:
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


def _doctor_command(commands: Any) -> None:
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
    from .data.converting.journal import NAME
    from .data.converting.layouts import Source, load
    from .data.converting.prepare import Prepare
    from .data.converting.survey import describe, survey
    from .data.converting.workers import processors
    from .towers import configs

    layout = load(options.layout, options.held_out)
    source = Source(options.source, layout, options.images, options.follow_links)
    tokenizer, workers = configs.tokenizer(options.model), options.workers or processors()
    if options.dry_run or not (options.out / NAME).exists():
        seen = survey(source, Prepare(tokenizer, options.splitter), workers)
        print(describe(seen, options.samples_per_shard), flush=True)
    if not options.dry_run:
        _convert(options, source, tokenizer, workers)


def _convert(options: argparse.Namespace, source: Any, tokenizer: Any, workers: int) -> None:
    from .data.converting import progress
    from .data.converting.convert import convert

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
    from .preview import preview
    from .preview.look import Moment

    written = preview(
        options.source,
        options.recipe,
        options.out,
        count=options.count,
        moment=Moment(options.epoch, options.progress),
        architecture=options.model,
    )
    print(written)


def _search(options: argparse.Namespace) -> None:
    from .search import open_folder, session

    with session.progress() as progress:
        searcher = open_folder(
            options.folder,
            options.model,
            progress,
            cache=options.cache,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
        )
    session.begin(searcher)
    if options.serve:
        session.serve(searcher, options.query, options.top, options.host, options.port)
    elif options.query is None:
        session.ask(searcher, options.top)
    else:
        session.answer(searcher, options.query, options.top)


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import examine

    return examine(options.data, options.benchmarks, options.runs, model=options.model, deep=options.deep)


def _sidecar(options: argparse.Namespace) -> None:
    from .data.sidecars.writer import write_sidecar
    from .towers import configs

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


def _average(options: argparse.Namespace) -> None:
    from .averaging import average
    from .export import write
    from .export.facts import public

    mean = average(options.models, options.shares, options.context_length, options.weights)
    about = {"mean_of": public(options.models), "shares": options.shares, "weights": options.weights}
    print(f"next: python -m eval.run model={write(mean, options.out, provenance=about)}")


def _export(options: argparse.Namespace) -> None:
    from .export import export_model, parity

    rows = export_model(options.source, options.out, options.format, options.dtype, options.weights)
    parity.show(rows, options.format)
    if options.format == "open_clip":
        print(f"next: python -m eval.run model={options.out}")
    else:
        print(f"wrote {options.out}: its README.md says how to open it")


def _push(options: argparse.Namespace) -> None:
    from .export.push import push

    print(push(options.folder, options.repository, options.public, options.endpoint))


def _import(options: argparse.Namespace) -> None:
    from .export import import_weights

    folder = import_weights(
        options.source, options.out, architecture=options.architecture, context_length=options.context_length
    )
    print(f"wrote {folder}: model.backbone.weights=local-dir:{folder} trains from it")


if __name__ == "__main__":
    sys.exit(main())
