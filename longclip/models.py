"""One way in for everything that is a trained model: a run, a checkpoint, an export, a hub name, a tag.

In: what the user typed. Out: a `Backbone` (open_clip model, its config, preprocessing, tokenizer).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch

from . import runs
from .stored import Stored
from .tokens import Tokenizer
from .towers import configs, fitting
from .towers.positions import merge_tables
from .towers.pretrained import Backbone, build
from .types import UserError

PREFIX = "tower.backbone."


def load(name: str, context_length: int | None = None) -> Backbone:
    """A model by run directory, .ckpt, export folder, `local-dir:`, `hf-hub:` or `ARCHITECTURE/TAG`.

    Args:
        context_length: stretch the text positions to this; None keeps them. Ours are never changed.
    """
    path = Path(name)
    if (path / "open_clip_config.json").is_file():
        return build(None, f"local-dir:{path}", context_length)
    if (path / "checkpoints").is_dir() or path.suffix == ".ckpt":
        return from_checkpoint(checkpoint_of(path))
    if name.startswith(("local-dir:", "hf-hub:")):
        return build(None, name, context_length)
    architecture, slash, tag = name.partition("/")
    if path.exists() or not slash:
        raise UserError(
            f"{name} is no run (no checkpoints/ in it), no .ckpt, no export (no open_clip_config.json in it) "
            "and no ARCHITECTURE/TAG such as ViT-B-16/openai"
        )
    return build(architecture, tag, context_length)


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a run directory or a path means."""
    if path.suffix == ".ckpt":
        return path
    newest = runs.newest_checkpoint(path) if path.is_dir() else None
    if newest is None:
        raise UserError(f"{path} holds no checkpoint (looked for {path / 'checkpoints' / 'step-*.ckpt'})")
    return newest


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's weights (`state_dict`) and plain values; nothing in its files is executed."""
    stored = Stored(path)
    return {**stored.values, "state_dict": stored.read_all("weights")}


def from_checkpoint(path: Path) -> Backbone:
    """The open_clip model inside a checkpoint; terms and their heads stay behind."""
    return backbone_of(read_checkpoint(path), str(path))


def backbone_of(content: dict[str, Any], label: str) -> Backbone:
    """The same from a checkpoint that is read already; `label` names it in messages."""
    model_cfg, preprocess_cfg = content["longclip"]["model_cfg"], content["longclip"]["preprocess_cfg"]
    tensors = {
        key.removeprefix(PREFIX): value
        for key, value in content["state_dict"].items()
        if key.startswith(PREFIX)
    }
    model = configs.instantiate(model_cfg, preprocess_cfg)
    fitting.load(model, fitting.renamed(model, merge_tables(tensors)), label)
    return Backbone(model, model_cfg, preprocess_cfg, tokenizer_of(model_cfg))


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
