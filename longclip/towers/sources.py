"""Where weights come from: a name as users type it in, the file and what is known about it out.

A tag of open_clip's, `local-dir:DIR`, `hf-hub:org/name` (folders of open_clip's layout or of Hugging Face's
`CLIPModel`), or a file. No tensor is read here (see `formats`).
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from open_clip.pretrained import download_pretrained_from_hf

from ..types import UserError
from . import configs, huggingface

log = logging.getLogger(__name__)

SCHEMES = ("local-dir:", "hf-hub:")
_CONFIG = "open_clip_config.json"
# The order in which open_clip looks for weights in a folder.
_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
)


class Source(NamedTuple):
    """Where weights come from, before any of their tensors is read."""

    label: str  # for messages
    file: Path | None = None  # None: random weights
    model_cfg: dict[str, Any] | None = None  # None: the architecture's name says it
    preprocess_cfg: dict[str, Any] = {}
    quick_gelu: bool | None = None  # what they were trained with, where that is known
    tokenizer: str | None = None  # what open_clip.get_tokenizer is asked; None: the architecture's name


def find(architecture: str | None, weights: str | None) -> Source:
    """What an architecture and weights, as `pretrained.build` takes them, mean. Raises UserError as that."""
    if architecture and architecture.startswith(SCHEMES):
        if weights is not None and weights != architecture:
            raise UserError(
                f"{architecture} brings its own weights: leave weights={weights!r} out, or the former."
            )
        architecture, weights = None, architecture
    if weights is None:
        if architecture is None:
            raise UserError("Name an architecture (for example ViT-B-16), or weights that bring one along.")
        return Source("random weights")
    if weights.startswith("local-dir:"):
        return _from_directory(Path(weights.removeprefix("local-dir:")).expanduser(), weights)
    if weights.startswith("hf-hub:"):
        return _from_hub(weights)
    name = (architecture or "").replace("/", "-")
    if architecture and open_clip.is_pretrained_cfg(name, weights):
        return _from_tag(name, weights)
    path = Path(weights).expanduser()
    if path.is_dir():
        return _from_directory(path, weights)
    if path.is_file():
        return Source(weights, path)
    raise _unknown_weights(architecture, weights)


def _unknown_weights(architecture: str | None, weights: str) -> UserError:
    if architecture is None:
        return UserError(
            f"There is no file {weights!r}; a tag of open_clip's needs its architecture beside it."
        )
    configs.named(architecture)  # a misspelt architecture is the likelier mistake: it has no tags at all
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture.replace("/", "-"))) or "none"
    return UserError(
        f"weights={weights!r} is neither a file nor a tag of {architecture}. Its tags: {tags}. Also "
        f"possible: local-dir:DIR, hf-hub:org/name, or null for random weights."
    )


def _from_tag(architecture: str, tag: str) -> Source:
    given = open_clip.get_pretrained_cfg(architecture, tag)
    label = f"{architecture} {tag}"
    try:
        with configs.quiet():
            file = Path(open_clip.download_pretrained(given))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"The weights {label} could not be downloaded and are in no cache: {error}"
        ) from error
    trained = bool(given.get("quick_gelu", False)) or bool(
        configs.named(architecture).get("quick_gelu", False)
    )
    return Source(label, file, None, given, trained)


def _from_directory(folder: Path, label: str) -> Source:
    if (folder / _CONFIG).is_file():
        return _described(folder / _CONFIG, _weights_in(folder, label), label)
    if (folder / huggingface.CONFIG).is_file():
        processor = folder / huggingface.PROCESSOR
        known = processor if processor.is_file() else None
        return _of_hugging_face(folder / huggingface.CONFIG, known, _weights_in(folder, label), label)
    raise UserError(
        f"{label}: there is no {_CONFIG} in {folder} and no {huggingface.CONFIG}; it takes a folder that "
        f"open_clip or the transformers library can open."
    )


def _weights_in(folder: Path, label: str) -> Path:
    names = [name for name in _WEIGHTS if (folder / name).is_file()]
    others = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pth")])
    if not names and len(others) != 1:
        raise UserError(
            f"{label}: {folder} holds {len(others)} weights files and none is named as open_clip names them "
            f"({_WEIGHTS[0]}, {_WEIGHTS[2]})."
        )
    return folder / names[0] if names else others[0]


def _from_hub(label: str) -> Source:
    name = label.removeprefix("hf-hub:")
    config = _fetched(name, _CONFIG, huggingface.CONFIG)
    if config.name == _CONFIG:
        return _described(config, _fetched(name, *_WEIGHTS[:3]), label)
    file = _fetched(name, huggingface.WEIGHTS, "pytorch_model.bin")
    processor = None
    with suppress(UserError):
        processor = _fetched(name, huggingface.PROCESSOR)
    return _of_hugging_face(config, processor, file, label)


def _fetched(name: str, *files: str) -> Path:
    """The first of these files of a hub's model that can be had."""
    problem: Exception | None = None
    for file in files:
        try:
            with configs.quiet():
                return Path(download_pretrained_from_hf(name, filename=file))
        except (OSError, RuntimeError, ValueError) as error:
            problem = error
    raise UserError(f"hf-hub:{name} could not be downloaded and is in no cache: {problem}") from problem


def _of_hugging_face(config: Path, processor: Path | None, file: Path, label: str) -> Source:
    """A CLIPModel. Its tokenizer is OpenAI's, which open_clip has under any of its own architectures."""
    try:
        model_cfg = huggingface.model_cfg(_json(config))
        preprocess = huggingface.preprocess_cfg(_json(processor)) if processor else {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{label}: {config} cannot be used: {error}") from error
    if processor is None:
        log.warning("%s: no %s, so images are prepared as OpenAI's were", label, huggingface.PROCESSOR)
    return Source(label, file, model_cfg, preprocess, model_cfg["quick_gelu"], "ViT-B-16")


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _described(config: Path, file: Path, label: str) -> Source:
    try:
        described = _json(config)
        model_cfg = described["model_cfg"]
        quick_gelu = bool(model_cfg.get("quick_gelu", False))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{label}: {config} is no configuration of open_clip's (no readable model_cfg)."
        ) from error
    return Source(label, file, model_cfg, described.get("preprocess_cfg", {}), quick_gelu, label)
