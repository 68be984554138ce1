"""Hugging Face's `CLIPModel` in open_clip's words: its configuration, its image processor, its tensors.

In: their JSON, and tensors under their names. Out: a model_cfg, a preprocess_cfg, and open_clip's names.
The transformers library is not asked, so nothing that a folder brings along can run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..types import UserError

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"

NAMES = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),  # spelt so
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale"),
)
"""How names begin, open_clip's and Hugging Face's."""

IN_A_BLOCK = (
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)

TURNED = ("visual.proj", "text_projection")
"""Matrices that open_clip keeps transposed."""

# What their configuration leaves out is this.
_TEXT = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_OPENAIS_VOCABULARY = 49408
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_THIRD = re.compile(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)")


def is_theirs(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of a whole CLIPModel."""
    return "text_model.final_layer_norm.weight" in tensors and "vision_model.post_layernorm.weight" in tensors


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under open_clip's names: attention inputs joined, projections turned; others as they are."""
    found: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        own = _own_name(name)
        third = _THIRD.fullmatch(own)
        if third:
            thirds.setdefault(f"{third[1]}in_proj_{third[3]}", {})[third[2]] = tensor
        elif not own.endswith(".position_ids"):  # counts from 0; old releases saved it
            found[own] = tensor.T.contiguous() if own in TURNED else tensor
    joined = {name: torch.cat([parts[k] for k in "qkv" if k in parts]) for name, parts in thirds.items()}
    return found | joined


def _own_name(theirs: str) -> str:
    for ours, prefix in NAMES:
        if theirs.startswith(prefix):
            name = ours + theirs.removeprefix(prefix)
            for inside, outside in IN_A_BLOCK:
                name = name.replace(outside, inside)
            return name
    return theirs


def model_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's configuration of a CLIPModel's config.json. Raises UserError for any other model."""
    if config.get("model_type") != "clip":
        raise UserError(
            f"it is of a {config.get('model_type')!r}; of Hugging Face's models longclip reads CLIPModel, "
            "whose model_type is 'clip' and which has both towers"
        )
    text, vision = _tower(config, "text", _TEXT), _tower(config, "vision", _VISION)
    _check(text, vision)
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _ACTIVATIONS[text["hidden_act"]],
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_sizes(vision),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            **_sizes(text),
        },
    }


def _tower(config: Mapping[str, Any], tower: str, default: Mapping[str, Any]) -> dict[str, Any]:
    # Old files hold a second dictionary, which wins.
    given = [config.get(f"{tower}_config{suffix}") or {} for suffix in ("", "_dict")]
    return {**default, **given[0], **given[1]}


def _sizes(tower: Mapping[str, Any]) -> dict[str, Any]:
    width, inner = tower["hidden_size"], tower["intermediate_size"]
    ratio = inner / width
    if int(width * ratio) != inner:  # open_clip rounds down what may be a hair below
        ratio = (inner + 0.5) / width
    return {"width": width, "layers": tower["num_hidden_layers"], "mlp_ratio": ratio}


def _check(text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    acts = {text["hidden_act"], vision["hidden_act"]}
    odd = []
    if len(acts) != 1 or not acts <= _ACTIVATIONS.keys():
        odd.append(f"hidden_act {' and '.join(sorted(acts))} (one of {', '.join(_ACTIVATIONS)} for both)")
    if {text["layer_norm_eps"], vision["layer_norm_eps"]} != {1e-5}:
        odd.append(f"layer_norm_eps {text['layer_norm_eps']} and {vision['layer_norm_eps']} (1e-05)")
    if text["vocab_size"] != _OPENAIS_VOCABULARY:
        odd.append(f"vocab_size {text['vocab_size']} ({_OPENAIS_VOCABULARY}, OpenAI's byte pairs)")
    if vision["num_channels"] != 3:
        odd.append(f"num_channels {vision['num_channels']} (3)")
    if odd:
        raise UserError(f"open_clip has no such towers, in parentheses what they are: {'; '.join(odd)}")


def preprocess_cfg(processor: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's words for a CLIPImageProcessor's preprocessor_config.json; {} for what it does not say."""
    found = {
        "mean": processor.get("image_mean"),
        "std": processor.get("image_std"),
        "interpolation": _RESAMPLING.get(processor.get("resample", 3)),
        "resize_mode": "shortest" if processor.get("do_center_crop", True) else "squash",
    }
    if found["interpolation"] is None:
        raise UserError(f"resample {processor['resample']} is neither bilinear (2) nor bicubic (3)")
    return {key: value for key, value in found.items() if value is not None}
