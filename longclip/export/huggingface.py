"""A model in Hugging Face's words: tensors, configuration, image processor (`towers.huggingface` reads them).

Four formats share them: `CLIPModel`, its two halves with their projections (LLaVA takes the one, diffusers
the other), and the bare text half as one file under the name that ComfyUI's loaders expect. The keys are
those of transformers 4, which release 5 reads, too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import open_clip
from safetensors.torch import save_file
from torch import Tensor

from ..towers.huggingface import CONFIG, IN_A_BLOCK, NAMES, PROCESSOR, TURNED, WEIGHTS
from .model import Plain
from .vocabulary import END, PAD, START, same_tokenizer, write_tokenizer

SINGLE = "clip_l.safetensors"
BOTH = ("text", "image")

CLIP_L = {"width": 768, "heads": 12, "layers": 12}
"""The text tower that is built wherever a file called clip_l is loaded: the one of ViT-L-14."""

_CLASSES = {
    ("text", "image"): "CLIPModel",
    ("text",): "CLIPTextModelWithProjection",
    ("image",): "CLIPVisionModelWithProjection",
}
_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers

# What the formulas below read, or what says nothing about a model of open_clip's own in eval mode.
_SAID = {
    "model_cfg": {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text"}
    | {"init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"},
    "vision_cfg": {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}
    | {"timm_pool", "timm_proj", "timm_model_pretrained", "attn_pooler_queries", "attn_pooler_heads"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
    | {"pad_id", "eos_id", "hf_proj_type", "hf_pooler_type", "hf_model_pretrained"},
}


def problems(made: Plain, parts: Collection[str] = BOTH) -> list[str]:
    """What Hugging Face's CLIP cannot express of these parts of the model, in words."""
    found = []
    if "text" in parts:
        found += _strangers(made.model_cfg["text_cfg"], open_clip.CLIPTextCfg(), "text_cfg")
        if not same_tokenizer(made.tokenizer):
            found.append("the tokenizer is not OpenAI's byte pairs with open_clip's plain cleaning")
    if "image" in parts:
        found += _strangers(made.model_cfg["vision_cfg"], open_clip.CLIPVisionCfg(), "vision_cfg")
        found += _image_problems(made)
    extra = {key: value for key, value in made.model_cfg.items() if key not in _SAID["model_cfg"] and value}
    found += [f"model_cfg has {key}={value!r}" for key, value in extra.items()]
    if "logit_bias" in made.state and set(parts) == set(BOTH):
        found.append("logit_bias, which sigmoid losses train, has no place in a CLIPModel")
    return found


def clip_l_problems(made: Plain) -> list[str]:
    """The same for a file that loaders take for the text tower of ViT-L-14, whatever is in it."""
    wanted = {**CLIP_L, "embed_dim": CLIP_L["width"], "quick_gelu": True}
    seen = {**_text_cfg(made), "quick_gelu": False, **made.model_cfg}
    odd = [key for key in wanted if seen[key] != wanted[key]]
    return problems(made, ("text",)) + [f"{key} is {seen[key]}, clip_l's is {wanted[key]}" for key in odd]


def _strangers(given: Mapping[str, Any], default: Any, where: str) -> list[str]:
    """Settings that are not open_clip's default and that Hugging Face's configuration has no word for."""
    defaults = dataclasses.asdict(default)
    return [
        f"{where}.{key} is {value!r}; Hugging Face's CLIP is made as with {defaults.get(key)!r}"
        for key, value in given.items()
        if key not in _SAID[where] and value != defaults.get(key)
    ]


def _image_problems(made: Plain) -> list[str]:
    vision = _vision_cfg(made)
    found = [
        f"vision_cfg.{key} is {vision[key]}, not one number"  # layers of a ResNet
        for key in ("layers", "patch_size")
        if not isinstance(vision[key], int)
    ]
    return found + processor_problems(made.preprocess_cfg)


def processor_problems(preprocess_cfg: Mapping[str, Any]) -> list[str]:
    """What `image_processor` has no word for, in words: oblong images, padding, other resampling."""
    size, mode, filtered = (preprocess_cfg[key] for key in ("size", "resize_mode", "interpolation"))
    found = []
    if not isinstance(size, int):
        found.append(f"vision_cfg.image_size is {size}, not one number")
    if mode not in ("shortest", "squash"):
        found.append(f"images are resized by {mode!r}, not by 'shortest' or 'squash'")
    if filtered not in _RESAMPLING:
        found.append(f"images are resampled by {filtered!r}, not 'bicubic' or 'bilinear'")
    return found


def part_of(state: Mapping[str, Tensor], parts: Collection[str]) -> dict[str, Tensor]:
    """The tensors of these parts under Hugging Face's names; the temperature only where both are there."""
    wanted = {*parts, "logit_scale"} if set(parts) == set(BOTH) else set(parts)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _tower_of(name) in wanted:
            found.update(_renamed(name.removeprefix("text."), tensor))  # text. of a CustomTextCLIP
    return found


def _tower_of(name: str) -> str:
    if name.startswith("logit_"):
        return name
    return "image" if name.startswith("visual.") else "text"


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of open_clip's: attention inputs come apart in three, projections are turned."""
    old, new = next(pair for pair in NAMES if name.startswith(pair[0]))
    target = new + name.removeprefix(old)
    for inside, outside in IN_A_BLOCK:
        target = target.replace(inside, outside)
    if ".in_proj_" in target:
        thirds = zip("qkv", tensor.chunk(3), strict=True)
        return {target.replace("in_proj_", f"{letter}_proj."): third.clone() for letter, third in thirds}
    if name in TURNED:
        return {target: tensor.T.contiguous()}
    return {target: tensor.reshape(()) if name == "logit_scale" else tensor}


def configuration(made: Plain, parts: tuple[str, ...] = BOTH) -> dict[str, Any]:
    """config.json: of the whole, or of one tower with its projection."""
    general = {
        "architectures": [_CLASSES[parts]],
        "projection_dim": made.model_cfg["embed_dim"],
        "dtype": str(made.dtype).removeprefix("torch."),
        "torch_dtype": str(made.dtype).removeprefix("torch."),  # what transformers 4 reads
        "longclip": made.provenance,
    }
    if parts == ("text",):
        return {**_text_config(made), **general}
    if parts == ("image",):
        return {**_vision_config(made), **general}
    towers = {"text_config": _text_config(made), "vision_config": _vision_config(made)}
    scale = float(made.state["logit_scale"].float())
    return {"model_type": "clip", **towers, **general, "logit_scale_init_value": scale}


def _text_config(made: Plain) -> dict[str, Any]:
    text = _text_cfg(made)
    return {
        "model_type": "clip_text_model",
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": made.context_length,
        "bos_token_id": START,
        "eos_token_id": END,  # 2, the default of old files, would pool at the largest id instead
        "pad_token_id": PAD,
        **_tower_config(made, text, text["heads"]),
    }


def _vision_config(made: Plain) -> dict[str, Any]:
    vision = _vision_cfg(made)
    return {
        "model_type": "clip_vision_model",
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "num_channels": 3,
        **_tower_config(made, vision, vision["width"] // vision["head_width"]),
    }


def _tower_config(made: Plain, tower: Mapping[str, Any], heads: int) -> dict[str, Any]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": int(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if made.model_cfg.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": made.model_cfg["embed_dim"],
    }


def _text_cfg(made: Plain) -> dict[str, Any]:
    return {**dataclasses.asdict(open_clip.CLIPTextCfg()), **made.model_cfg["text_cfg"]}


def _vision_cfg(made: Plain) -> dict[str, Any]:
    return {**dataclasses.asdict(open_clip.CLIPVisionCfg()), **made.model_cfg["vision_cfg"]}


def image_processor(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json of a `CLIPImageProcessor`: shortest side and centre crop, or squash."""
    side = preprocess_cfg["size"]
    square, crop = {"height": side, "width": side}, preprocess_cfg["resize_mode"] == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if crop else square,
        "resample": _RESAMPLING[preprocess_cfg["interpolation"]],
        "do_center_crop": crop,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_cfg["mean"]),
        "image_std": list(preprocess_cfg["std"]),
    }


def write(made: Plain, folder: Path, parts: tuple[str, ...] = BOTH) -> None:
    """What `from_pretrained(DIR)` opens: weights, configuration, tokenizer, image processor."""
    save_file(part_of(made.state, parts), folder / WEIGHTS, metadata={"format": "pt"})
    if "text" in parts:
        write_tokenizer(made.context_length, folder)
    if "image" in parts:
        _write_json(folder / PROCESSOR, image_processor(made.preprocess_cfg))
    _write_json(folder / CONFIG, configuration(made, parts))


def write_clip_l(made: Plain, folder: Path) -> None:
    """The text half as one file; where it comes from stands in its header."""
    about = {"format": "pt", "longclip": json.dumps(made.provenance)}
    save_file(part_of(made.state, ("text",)), folder / SINGLE, metadata=about)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
