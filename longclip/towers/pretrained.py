"""A CLIP model with weights, ready for long captions: names in, `Backbone` out.

    backbone = build("ViT-B-16", "openai", context_length=248)

Weights come from open_clip's tags, `local-dir:DIR`, `hf-hub:org/name` or a file (see `sources`, `formats`).
Activation and preprocessing travel with them; the text positions are resized by rule (see `positions`), the
image positions only on request; a tensor missing, left over or of another shape is an error.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import open_clip
from torch import nn

from ..tokens import Tokenizer
from ..types import UserError
from . import configs, fitting, formats, sources
from .positions import freeze_head, text_module
from .rotary import KEY, Published, turn
from .temperature import scale_attention
from .text import why_padded

log = logging.getLogger(__name__)

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
    published: Published | None = None  # None: the weights are the model's own
    random: bool = False  # nobody trained them


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
    attention_temperature: float = 1.0,
    rotary: float | None = None,
) -> Backbone:
    """An open_clip model with its configuration, preprocessing and tokenizer.

    `architecture` is a name of open_clip's or longclip's; it may be None where the weights say it
    (local-dir:, hf-hub:, OpenAI and Long-CLIP files). `weights` is None (random, as the caller seeded
    torch), a tag, local-dir:DIR, hf-hub:org/name or a file. `context_length` counts start and end token;
    None keeps the length of the weights. `positions` (one of `positions.METHODS`) and `keep` say how
    shorter text positions are lengthened; `freeze_positions` freezes the first `keep` rows.
    `image_size` in pixels resizes the image positions as open_clip does. `quick_gelu` None: as the
    weights were trained, else as the configuration says. `attention_temperature` below 1 sharpens the text
    tower's attention (`temperature`). `rotary` is the theta of positions that replace the table (`rotary`).

    Raises UserError for everything that does not fit together.
    """
    source = sources.find(architecture, weights)
    loaded = formats.read(source.file) if source.file else None
    known = loaded.quick_gelu if loaded and loaded.quick_gelu is not None else source.quick_gelu
    config = _config(architecture, source, loaded)
    if context_length is None and loaded:
        context_length = fitting.table_length(loaded.tensors)
    activation = _activation(quick_gelu, known, bool(config.get("quick_gelu", False)), source.label)
    config = configs.adjusted(config, context_length, image_size, patch_dropout, activation)
    preprocess = _preprocess(source.preprocess_cfg, config)
    model, table_LD = configs.instantiate(config, preprocess), None
    if loaded:
        tensors = fitting.renamed(model, loaded.tensors)
        table_LD = fitting.table(tensors)
        tensors = fitting.resized_text(model, tensors, positions if rotary is None else "interpolate", keep)
        if image_size is not None:
            tensors = fitting.resized_image(model, tensors)
        fitting.load(model, tensors, source.label)
    scale_attention(model, attention_temperature)
    if rotary is not None:
        replaced_LD, config[KEY] = _turned(model, rotary), rotary
        table_LD = replaced_LD if table_LD is None else table_LD
    elif freeze_positions:
        if loaded is None:
            log.warning("freeze_positions: the first %d positions are random and stay so", keep)
        freeze_head(text_module(model), keep)
    published = None if table_LD is None else Published(table_LD, temperature=attention_temperature)
    return Backbone(
        model, config, preprocess, _tokenizer(architecture, source, config), published, not loaded
    )


def _turned(model: nn.Module, theta: float) -> Any:
    """Rotary positions in place of a table, which is returned."""
    because = why_padded(model)
    if because:
        raise UserError(
            f"model.backbone.rotary={theta} turns captions that run packed, and this text tower runs padded: "
            f"{because}; leave it out (null), or choose model.backbone.architecture=ViT-B-16"
        )
    text: Any = text_module(model)
    table_LD = text.positional_embedding.detach()
    turn(model, theta)
    return table_LD


def _config(
    architecture: str | None, source: sources.Source, loaded: formats.Weights | None
) -> dict[str, Any]:
    """The configuration to start from; a name and weights that say different things are refused."""
    by_name = architecture and not architecture.startswith(sources.SCHEMES)
    if source.model_cfg is None:
        if loaded and loaded.kind == "hugging face":
            raise UserError(
                f"{source.label} has Hugging Face's names, and what else it needs stands in a config.json: "
                "name the folder of both, local-dir:DIR."
            )
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


def _tokenizer(architecture: str | None, source: sources.Source, config: dict[str, Any]) -> Tokenizer:
    text = config["text_cfg"]
    name = source.tokenizer or (architecture or "").replace("/", "-")
    try:
        with configs.quiet():
            theirs = open_clip.get_tokenizer(name, context_length=text["context_length"])
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"The tokenizer of {name} could not be loaded: {error}") from error
    return Tokenizer(theirs, text["context_length"])
