"""One way in for everything that is a trained model: a run, a checkpoint, an export, a hub name, a tag.

In: what the user typed. Out: a `Backbone` (open_clip model, its config, preprocessing, tokenizer).
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from . import ema, runs
from .optim import LN_100
from .stored import Stored
from .tokens import Tokenizer
from .towers import configs, fitting
from .towers.experts import make_room
from .towers.merging import merged
from .towers.pretrained import Backbone, build
from .towers.rotary import KEY, Published
from .types import UserError

log = logging.getLogger(__name__)

PREFIX = "tower.backbone."


def load(
    name: str,
    context_length: int | None = None,
    weights: str | None = None,
    positions: str = "stretch",
    keep: int = 20,
) -> Backbone:
    """A model by run directory, .ckpt, export folder, `local-dir:`, `hf-hub:` or `ARCHITECTURE/TAG`.

    Args:
        context_length: lengthen the text positions to this; None keeps them.
        weights: which of a checkpoint, "raw" or "ema"; None: the running averages where it holds them.
        positions, keep: how they are lengthened, as `pretrained.build` says.
    """
    path = Path(name)
    if any((path / config).is_file() for config in ("open_clip_config.json", "config.json")):
        return build(None, f"local-dir:{path}", context_length, positions, keep)
    if (path / "checkpoints").is_dir() or path.suffix == ".ckpt":
        content = read_checkpoint(checkpoint_of(path), weights)
        return backbone_of(content, str(path), context_length, positions, keep)
    if name.startswith(("local-dir:", "hf-hub:")):
        return build(None, name, context_length, positions, keep)
    architecture, slash, tag = name.partition("/")
    if path.exists() or not slash or path.parent.is_dir():  # runs/mien is a mistyped run
        raise UserError(
            f"{name} is no run (no checkpoints/ in it), no .ckpt, no export (no open_clip_config.json or "
            "config.json in it) and no ARCHITECTURE/TAG such as ViT-B-16/openai"
        )
    return build(architecture, tag, context_length, positions, keep)


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a run directory or a path means."""
    if path.suffix == ".ckpt":
        return path
    newest = runs.newest_checkpoint(path) if path.is_dir() else None
    if newest is None:
        raise UserError(f"{path} holds no checkpoint (looked for {path / 'checkpoints' / 'step-*.ckpt'})")
    return newest


def read_checkpoint(path: Path, weights: str | None = None) -> dict[str, Any]:
    """A checkpoint's `state_dict`, which `weights` these are, and plain values; nothing in it is executed.

    Raises UserError where the running averages ("ema") are asked for and it holds none.
    """
    stored = Stored(path)
    tensors, averages = stored.read_all("weights"), stored.read_all(ema.KIND)
    averaged = ema.chosen(weights, bool(averages), str(path))
    if averaged:
        log.info("%s: the running averages of its weights", path)
        tensors |= {name: _clamped(name, tensor) for name, tensor in averages.items()}
    return {**stored.values, "weights": ema.KIND if averaged else "raw", "state_dict": tensors}


def _clamped(name: str, tensor: Tensor) -> Tensor:
    """An average follows the optimizer, which the bound on temperatures holds back only afterwards."""
    return tensor.clamp(0, LN_100) if name.endswith("logit_scale") else tensor


def backbone_of(
    content: dict[str, Any],
    label: str,
    context_length: int | None = None,
    positions: str = "stretch",
    keep: int = 20,
) -> Backbone:
    """The model in a checkpoint that is read already, without terms and their heads; arguments as `load`'s.

    `label` names it in messages.
    """
    known_cfg, preprocess_cfg = content["longclip"]["model_cfg"], content["longclip"]["preprocess_cfg"]
    model_cfg = configs.lengthened(known_cfg, context_length)
    tensors = {
        key.removeprefix(PREFIX): value
        for key, value in content["state_dict"].items()
        if key.startswith(PREFIX)
    }
    model = configs.instantiate(model_cfg, preprocess_cfg)
    tensors = fitting.renamed(model, merged(tensors))
    make_room(model, tensors)
    table_LD = fitting.table(tensors)
    published = None if table_LD is None else Published(table_LD, known_cfg.get(KEY))
    fitting.load(model, fitting.resized_text(model, tensors, positions, keep), label)
    return Backbone(model, model_cfg, preprocess_cfg, tokenizer_of(model_cfg), published)


def tokenizer_of(model_cfg: dict[str, Any]) -> Tokenizer:
    """The tokenizer that open_clip would choose for an exported model of this config."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
        with configs.quiet():
            found = open_clip.get_tokenizer(f"local-dir:{folder}")
    return Tokenizer(found, model_cfg["text_cfg"]["context_length"])


def fingerprint(backbone: Backbone) -> str:
    """16 hex digits over all that embeddings depend on: weights, architecture, preprocessing, tokenizer."""
    facts = [backbone.model_cfg, backbone.preprocess_cfg, backbone.tokenizer.name_hash]
    seen = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(backbone.model.state_dict().items()):
        seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return seen.hexdigest()[:16]
