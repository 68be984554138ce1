"""A CLIP model with weights, ready for long captions: names in, `Backbone` out.

    backbone = build("ViT-B-16", "openai", context_length=248)

Weights come from open_clip's tags, `local-dir:DIR`, `hf-hub:org/name` or a file (see `formats`). Activation
and preprocessing travel with them; the text positions are resized by rule (see `positions`), the image
positions only on request; a tensor missing, left over or of another shape is an error.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from open_clip.pretrained import download_pretrained_from_hf
from torch import nn

from ..tokens import Tokenizer
from ..types import UserError
from . import configs, fitting, formats
from .positions import freeze_head, text_module

log = logging.getLogger(__name__)

_SCHEMES = ("local-dir:", "hf-hub:")
_CONFIG = "open_clip_config.json"
# The order in which open_clip looks for weights in a folder.
_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
)
_PREPROCESS: dict[str, Any] = {
    "mean": open_clip.OPENAI_DATASET_MEAN,
    "std": open_clip.OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


class Backbone(NamedTuple):
    """A model and what must travel with it."""

    model: nn.Module  # open_clip's CLIP or CustomTextCLIP, float32
    model_cfg: dict[str, Any]  # open_clip's configuration that describes exactly this model
    preprocess_cfg: dict[str, Any]  # mean, std, interpolation, resize_mode, size
    tokenizer: Tokenizer


class _Source(NamedTuple):
    """Where weights come from, before any of their tensors is read."""

    label: str  # for messages
    file: Path | None = None  # None: random weights
    model_cfg: dict[str, Any] | None = None  # None: the architecture's name says it
    preprocess_cfg: dict[str, Any] = {}
    quick_gelu: bool | None = None  # what they were trained with, where that is known
    tokenizer: str | None = None  # what open_clip.get_tokenizer is asked; None: the architecture's name


def build(
    architecture: str | None,
    weights: str | None,
    context_length: int | None,
    positions: str = "stretch",
    keep: int = 20,
    freeze_positions: bool = False,
    image_size: int | None = None,
    patch_dropout: float = 0.0,
    quick_gelu: bool | None = None,
) -> Backbone:
    """An open_clip model with its configuration, preprocessing and tokenizer.

    `architecture` is a name of open_clip's or longclip's; it may be None where the weights say it
    (local-dir:, hf-hub:, OpenAI and Long-CLIP files). `weights` is None (random, as the caller seeded
    torch), a tag, local-dir:DIR, hf-hub:org/name or a file. `context_length` counts start and end token;
    None keeps the length of the weights. `positions` ("stretch" or "interpolate") and `keep` say how
    shorter text positions are lengthened; `freeze_positions` freezes the first `keep` rows.
    `image_size` in pixels resizes the image positions as open_clip does. `quick_gelu` None: as the
    weights were trained, else as the configuration says.

    Raises UserError for everything that does not fit together.
    """
    source = _source(architecture, weights)
    loaded = formats.read(source.file) if source.file else None
    known = loaded.quick_gelu if loaded and loaded.quick_gelu is not None else source.quick_gelu
    config = _config(architecture, source, loaded)
    if context_length is None and loaded:
        context_length = fitting.table_length(loaded.tensors)
    activation = _activation(quick_gelu, known, bool(config.get("quick_gelu", False)), source.label)
    config = configs.adjusted(config, context_length, image_size, patch_dropout, activation)
    preprocess = _preprocess(source.preprocess_cfg, config)
    model = configs.instantiate(config, preprocess)
    if loaded:
        tensors = fitting.renamed(model, loaded.tensors)
        tensors = fitting.resized_text(model, tensors, positions, keep)
        if image_size is not None:
            tensors = fitting.resized_image(model, tensors)
        fitting.load(model, tensors, source.label)
    if freeze_positions:
        if loaded is None:
            log.warning("freeze_positions: the first %d positions are random and stay so", keep)
        freeze_head(text_module(model), keep)
    return Backbone(model, config, preprocess, _tokenizer(architecture, source, config))


def _source(architecture: str | None, weights: str | None) -> _Source:
    if architecture and architecture.startswith(_SCHEMES):
        if weights is not None and weights != architecture:
            raise UserError(
                f"{architecture} brings its own weights: leave weights={weights!r} out, or the former."
            )
        architecture, weights = None, architecture
    if weights is None:
        if architecture is None:
            raise UserError("Name an architecture (for example ViT-B-16), or weights that bring one along.")
        return _Source("random weights")
    if weights.startswith("local-dir:"):
        return _from_directory(Path(weights.removeprefix("local-dir:")).expanduser(), weights)
    if weights.startswith("hf-hub:"):
        return _from_hub(weights)
    name = (architecture or "").replace("/", "-")
    if architecture and open_clip.is_pretrained_cfg(name, weights):
        return _from_tag(name, weights)
    if Path(weights).expanduser().is_file():
        return _Source(weights, Path(weights).expanduser())
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


def _from_tag(architecture: str, tag: str) -> _Source:
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
    return _Source(label, file, None, given, trained)


def _from_directory(folder: Path, label: str) -> _Source:
    if not (folder / _CONFIG).is_file():
        raise UserError(
            f"{label}: there is no {_CONFIG} in {folder}; it takes a folder that open_clip can open."
        )
    names = [name for name in _WEIGHTS if (folder / name).is_file()]
    others = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pth")])
    if not names and len(others) != 1:
        raise UserError(
            f"{label}: {folder} holds {len(others)} weights files and none is named as open_clip names them "
            f"({_WEIGHTS[0]}, {_WEIGHTS[2]})."
        )
    return _described(folder / _CONFIG, folder / names[0] if names else others[0], label)


def _from_hub(label: str) -> _Source:
    name = label.removeprefix("hf-hub:")
    try:
        with configs.quiet():
            config = Path(download_pretrained_from_hf(name, filename=_CONFIG))
            file = Path(download_pretrained_from_hf(name))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{label} could not be downloaded and is in no cache: {error}") from error
    return _described(config, file, label)


def _described(config: Path, file: Path, label: str) -> _Source:
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
        model_cfg = described["model_cfg"]
        quick_gelu = bool(model_cfg.get("quick_gelu", False))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{label}: {config} is no configuration of open_clip's (no readable model_cfg)."
        ) from error
    return _Source(label, file, model_cfg, described.get("preprocess_cfg", {}), quick_gelu, label)


def _config(architecture: str | None, source: _Source, loaded: formats.Weights | None) -> dict[str, Any]:
    """The configuration to start from; a name and weights that say different things are refused."""
    by_name = architecture and not architecture.startswith(_SCHEMES)
    if source.model_cfg is None:
        if by_name:
            assert architecture
            return configs.named(architecture)
        if loaded is None or loaded.kind == "state dict":
            raise UserError(f"{source.label} does not say its architecture: name it, for example ViT-B-16.")
        return configs.inferred(loaded.tensors)
    if by_name:
        assert architecture
        differ = configs.differences(configs.named(architecture), source.model_cfg)
        if differ:
            raise UserError(
                f"architecture={architecture} contradicts {source.label}: {'; '.join(differ[:5])}. "
                f"Leave the architecture out (null), the weights bring their own."
            )
    return source.model_cfg


def _activation(wanted: bool | None, known: bool | None, configured: bool, label: str) -> bool:
    if known is None:
        return configured if wanted is None else wanted
    if wanted is not None and wanted != known:
        trained = "QuickGELU" if known else "GELU"
        raise UserError(
            f"quick_gelu={wanted} contradicts {label}: those weights were trained with {trained} and lose "
            f"points silently with another activation. Leave quick_gelu out (null)."
        )
    return known


def _preprocess(given: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    known = {key: given[key] for key in (*_PREPROCESS, "fill_color") if given.get(key) is not None}
    merged = {**_PREPROCESS, **known, "size": config["vision_cfg"]["image_size"]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in merged.items()}


def _tokenizer(architecture: str | None, source: _Source, config: dict[str, Any]) -> Tokenizer:
    text = config["text_cfg"]
    name = source.tokenizer or (architecture or "").replace("/", "-")
    try:
        with configs.quiet():
            theirs = open_clip.get_tokenizer(name, context_length=text["context_length"])
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"The tokenizer of {name} could not be loaded: {error}") from error
    return Tokenizer(theirs, text["context_length"])
