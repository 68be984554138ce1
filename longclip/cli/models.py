"""Commands about models: `average`, `export`, `push`, `import`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def average_command(commands: Any) -> None:
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
        "--context-length", type=int, help="lengthen positions to this; default: to those of the last"
    )
    _how_positions_grow(mean)
    mean.add_argument("--weights", choices=["ema", "raw"], help="of checkpoints, as in export")
    mean.set_defaults(run=_average)


def export_command(commands: Any) -> None:
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


def push_command(commands: Any) -> None:
    push = commands.add_parser("push", help="an export -> a model hub; nothing else sends anything")
    push.add_argument("folder", type=Path, help="what `longclip export` made")
    push.add_argument("repository", help="OWNER/NAME; made where it is not there yet")
    push.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    push.add_argument("--endpoint", help="another hub's address; default: Hugging Face, or HF_ENDPOINT")
    push.set_defaults(run=_push)


def import_command(commands: Any) -> None:
    bring = commands.add_parser("import", help="weights of others -> a folder that open_clip loads")
    bring.add_argument(
        "source",
        help="a file (OpenAI archive, Long-CLIP .pt, open_clip epoch_N.pt ...), a folder of Hugging Face's "
        "CLIPModel, or hf-hub:ORG/NAME",
    )
    bring.add_argument("--out", type=Path, required=True)
    bring.add_argument("--architecture", help="an open_clip name; default: read from the tensors' shapes")
    bring.add_argument(
        "--context-length", type=int, help="lengthen the positions to this; default: as they are"
    )
    _how_positions_grow(bring)
    bring.add_argument(
        "--attention-temperature",
        type=float,
        default=1.0,
        help="below 1: sharper attention in the text tower",
    )
    bring.set_defaults(run=_import)


def _how_positions_grow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--positions",
        default="stretch",
        choices=["stretch", "interpolate", "group", "repeat"],
        help="how they grow; default: stretch, as Long-CLIP",
    )
    parser.add_argument(
        "--keep", type=int, default=20, help="positions at the beginning that stay; default: 20"
    )


def _average(options: argparse.Namespace) -> None:
    from ..averaging import average
    from ..export import write
    from ..export.facts import public

    mean = average(
        options.models,
        options.shares,
        options.context_length,
        options.weights,
        options.positions,
        options.keep,
    )
    about = {"mean_of": public(options.models), "shares": options.shares, "weights": options.weights}
    print(f"next: python -m eval.run model={write(mean, options.out, provenance=about)}")


def _export(options: argparse.Namespace) -> None:
    from ..export import export_model, parity

    rows = export_model(options.source, options.out, options.format, options.dtype, options.weights)
    parity.show(rows, options.format)
    if options.format == "open_clip":
        print(f"next: python -m eval.run model={options.out}")
    else:
        print(f"wrote {options.out}: its README.md says how to open it")


def _push(options: argparse.Namespace) -> None:
    from ..export.push import push

    print(push(options.folder, options.repository, options.public, options.endpoint))


def _import(options: argparse.Namespace) -> None:
    from ..export import import_weights

    folder = import_weights(
        options.source,
        options.out,
        options.architecture,
        options.context_length,
        options.positions,
        options.keep,
        options.attention_temperature,
    )
    print(f"wrote {folder}: model.backbone.weights=local-dir:{folder} trains from it")
