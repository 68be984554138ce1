"""A trained model for everybody else: open_clip folders out, checked in a process without longclip.

    export_open_clip(backbone, "runs/demo/export")     # writes weights, then the configuration
    parity.verify(backbone, "runs/demo/export")        # opens them with open_clip alone and compares
    export_run("runs/demo", "runs/demo/export")        # both, from a run's newest checkpoint
    import_weights("longclip-B.pt", "models/longclip-B")

An export holds a plain dual encoder: split position tables are merged, training-only settings dropped.
What open_clip cannot express is refused with the whole list, before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import __version__, models, parity
from .towers import configs
from .towers.clip import DualTower
from .towers.positions import merged_state_dict
from .towers.pretrained import Backbone, build
from .types import UserError

log = logging.getLogger(__name__)

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def export_open_clip(
    backbone: Backbone, directory: str | Path, provenance: Mapping[str, Any] | None = None
) -> Path:
    """Write the folder that `open_clip.create_model_and_transforms("local-dir:DIR")` opens.

    `provenance` (plain JSON values) goes beside the configuration under "longclip". An older export in
    the folder is replaced; a run that dies midway leaves a folder without configuration, which nothing
    opens, never new weights beside an old configuration. Returns the directory.

    Raises UserError with the list of all that open_clip cannot express, or where the disk refuses.
    """
    state = merged_state_dict(backbone.model)
    model_cfg = _inference_cfg(backbone.model_cfg)
    problems = find_problems(backbone, state)
    if problems:
        raise UserError("This model cannot be exported for open_clip:\n  - " + "\n  - ".join(problems))
    preprocess = {key: value for key, value in backbone.preprocess_cfg.items() if key != "size"}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess, "longclip": dict(provenance or {})}
    directory = Path(directory).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory, state, json.dumps(config, indent=2) + "\n", model_cfg)
    except OSError as error:
        raise UserError(f"The export could not be written to {directory}: {error}.") from error
    return directory


def export_run(source: str | Path, directory: str | Path) -> dict[str, float]:
    """A run directory or a checkpoint -> an open_clip folder, verified against the packed tower that trained.

    Returns the largest feature differences that `parity.verify` found. Raises UserError as it does.
    """
    path = models.checkpoint_of(Path(source))
    content = models.read_checkpoint(path)
    backbone = models.backbone_of(content, str(path))
    provenance = {
        "longclip": __version__,
        "checkpoint": path.name,
        "step": content["global_step"],
        "samples_seen": content["longclip"]["samples_seen"],
    }
    export_open_clip(backbone, directory, provenance)
    found = parity.verify(backbone, directory, encode_text=DualTower(backbone).encode_captions)
    log.info("exported to %s; features equal the trained model's within %.1e", directory, max(found.values()))
    return found


def find_problems(backbone: Backbone, state: Mapping[str, Tensor]) -> list[str]:
    """All that keeps open_clip from building this very model from its model_cfg, in words; [] if nothing.

    `state` is what would be written.
    """
    model_cfg = backbone.model_cfg
    context, limit = model_cfg["text_cfg"]["context_length"], backbone.tokenizer.context_length
    problems = []
    if context != limit:
        problems.append(f"model_cfg says context_length {context}, the tokenizer cuts at {limit}")
    with torch.device("meta"):
        reference = configs.instantiate(model_cfg, backbone.preprocess_cfg)
    problems += _module_problems(backbone.model, reference)
    expected = reference.state_dict()
    problems += [f"tensor {name} has no place in open_clip's model" for name in state if name not in expected]
    for name, tensor in expected.items():
        if name not in state:
            problems.append(f"tensor {name} is missing")
        elif state[name].shape != tensor.shape:
            problems.append(
                f"{name} is {list(state[name].shape)} where model_cfg makes it {list(tensor.shape)}"
            )
    problems += [f"{name} holds NaN or infinity" for name, tensor in state.items() if not _finite(tensor)]
    return problems


def _module_problems(model: nn.Module, reference: nn.Module) -> list[str]:
    theirs = dict(reference.named_modules())
    problems = []
    for name, module in model.named_modules():
        if "parametrizations" in name.split("."):
            continue
        kind = parametrize.type_before_parametrizations(module)
        if name not in theirs:
            problems.append(f"module {name} ({kind.__name__}) has no place in open_clip's model")
        elif kind is not type(theirs[name]):
            problems.append(f"module {name} is a {kind.__name__}, model_cfg makes it a {_kind(theirs[name])}")
    return problems


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _inference_cfg(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Without patch dropout, which belongs to a training run and not to the model."""
    plain = deepcopy(dict(model_cfg))
    plain["vision_cfg"].pop("patch_dropout", None)
    return plain


def _write(directory: Path, state: Mapping[str, Tensor], config: str, model_cfg: Mapping[str, Any]) -> None:
    """Weights first, configuration last, each renamed into place when it is complete."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=".export-") as scratch:
        save_file({name: _plain(tensor) for name, tensor in state.items()}, Path(scratch) / WEIGHTS)
        (Path(scratch) / CONFIG).write_text(config, encoding="utf-8")
        (directory / CONFIG).unlink(missing_ok=True)
        _save_tokenizer(directory, model_cfg["text_cfg"])
        os.replace(Path(scratch) / WEIGHTS, directory / WEIGHTS)
        os.replace(Path(scratch) / CONFIG, directory / CONFIG)


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().to("cpu")
    # clone: safetensors refuses tensors that share storage.
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().clone()


def _save_tokenizer(directory: Path, text_cfg: Mapping[str, Any]) -> None:
    """open_clip looks for a Hugging Face tokenizer inside the folder and nowhere else."""
    name = text_cfg.get("hf_tokenizer_name")
    if name:
        open_clip.tokenizer.HFTokenizer(name).tokenizer.save_pretrained(directory)


def import_weights(
    source: str,
    out: str | Path,
    architecture: str | None = None,
    context_length: int | None = None,
    positions: str = "stretch",
    keep: int = 20,
) -> Path:
    """Bring foreign weights (a file, tag, local-dir: or hf-hub:) into an open_clip folder `out`.

    OpenAI's ViT archives and Long-CLIP's .pt say their architecture by their shapes; other files need it
    named. `context_length` None keeps the length of the weights; a longer one resizes the positions as
    `positions` and `keep` say. Raises UserError as `build` and `export_open_clip` do.
    """
    backbone = build(architecture, source, context_length, positions, keep)
    file = Path(source).expanduser()
    provenance = {"imported_from": source, "architecture": architecture}
    if file.is_file():
        provenance["sha256"] = _sha256(file)
    return export_open_clip(backbone, out, provenance)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
