"""Architectures: open_clip's model configurations by name or from tensor shapes, and models made of them.

A configuration is the JSON that open_clip ships and that stands in an export's `model_cfg`. longclip's
own small ones lie in `architectures/` and are registered with open_clip, so both know them by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from ..tokens import Tokenizer
from ..types import UserError
from . import rotary

_OWN = Path(__file__).parent / "architectures"
# What may differ between two configurations of one network.
_FREE = {
    "context_length",
    "hf_model_pretrained",
    "hf_tokenizer_name",
    "image_size",
    "output_tokens",
    "patch_dropout",
    "timm_model_pretrained",
    "tokenizer_kwargs",
}
# open_clip hands all to transformers, where trust_remote_code runs what a model's folder brings along.
_TOKENIZER_OPTIONS = {"clean", "language", "reduction_mask", "strip_sep_token"}


@functools.cache
def register() -> None:
    """Make longclip's own architectures known to open_clip. Again is harmless."""
    open_clip.add_model_config(_OWN)


def named(architecture: str) -> dict[str, Any]:
    """A fresh copy of the configuration of that name. Raises UserError with the nearest names."""
    register()
    config = open_clip.get_model_config(architecture.replace("/", "-"))
    if config is not None:
        return config
    names = {name.lower(): name for name in open_clip.list_models()}
    near = [names[match] for match in difflib.get_close_matches(architecture.lower(), names, n=5, cutoff=0.5)]
    raise UserError(
        f"There is no architecture {architecture!r}. {'Near it: ' + ', '.join(near) + '. ' if near else ''}"
        f'`python -c "import open_clip; print(*open_clip.list_models())"` lists open_clip\'s, and longclip '
        f"adds {', '.join(sorted(path.stem for path in _OWN.glob('*.json')))}."
    )


def tokenizer(architecture: str, context_length: int = 248) -> Tokenizer:
    """The tokenizer of the architecture of that name. Raises UserError with the nearest names."""
    named(architecture)
    theirs = open_clip.get_tokenizer(architecture.replace("/", "-"), context_length=context_length)
    return Tokenizer(theirs, context_length)


def inferred(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration of an OpenAI ViT from its tensors' shapes (heads are 64 wide in all of those).

    Raises UserError where the names or widths are not those of an OpenAI ViT.
    """
    needed = ("visual.proj", "visual.conv1.weight", "visual.positional_embedding", "text_projection")
    widths = [
        tensors[name].shape[0] for name in ("visual.conv1.weight", "ln_final.weight") if name in tensors
    ]
    if any(name not in tensors for name in needed) or len(widths) < 2 or any(width % 64 for width in widths):
        raise UserError(
            "The architecture cannot be told from these weights (only OpenAI's ViT layout with heads 64 wide "
            "says it by its shapes): name it, for example architecture=ViT-B-16."
        )
    patch = tensors["visual.conv1.weight"].shape[-1]
    grid = round((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    context, width = tensors["positional_embedding"].shape
    return {
        "embed_dim": tensors["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": patch * grid,
            "layers": _blocks(tensors, "visual.transformer.resblocks."),
            "width": widths[0],
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": tensors["token_embedding.weight"].shape[0],
            "width": width,
            "heads": width // 64,
            "layers": _blocks(tensors, "transformer.resblocks."),
        },
    }


def _blocks(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What makes two configurations different networks, as "text_cfg.width 512 and 768"."""
    left, right = _spelled_out(one), _spelled_out(other)
    return [f"{key} {left[key]} and {right[key]}" for key in left if left[key] != right[key]]


def _spelled_out(config: Mapping[str, Any]) -> dict[str, object]:
    try:
        towers = {
            "vision_cfg": open_clip.CLIPVisionCfg(**config["vision_cfg"]),
            "text_cfg": open_clip.CLIPTextCfg(**config["text_cfg"]),
        }
    except (TypeError, KeyError) as error:
        raise UserError(f"This is no model configuration of open_clip's: {error}.") from error
    values = {
        f"{tower}.{key}": value
        for tower, given in towers.items()
        for key, value in dataclasses.asdict(given).items()
        if key not in _FREE
    }
    return {"embed_dim": config["embed_dim"], rotary.KEY: config.get(rotary.KEY), **values}


def adjusted(
    config: Mapping[str, Any],
    context_length: int | None,
    image_size: int | None,
    patch_dropout: float,
    quick_gelu: bool,
) -> dict[str, Any]:
    """A copy with these values in it; None keeps what it says. Raises UserError where they cannot apply."""
    changed = deepcopy(dict(config))
    if "multimodal_cfg" in config:
        raise UserError("CoCa models (multimodal_cfg) are not dual encoders; choose a CLIP architecture.")
    if not 0 <= patch_dropout < 1:
        raise UserError(f"patch_dropout={patch_dropout} is not a share: use 0 or more, and less than 1.")
    vision, text = changed["vision_cfg"], changed["text_cfg"]
    if patch_dropout and isinstance(vision.get("layers"), list | tuple):
        raise UserError("patch_dropout needs an image tower that sees patches; this one is a ResNet.")
    text.setdefault("context_length", open_clip.CLIPTextCfg().context_length)
    vision.setdefault("image_size", open_clip.CLIPVisionCfg().image_size)
    if context_length is not None:
        text["context_length"] = context_length
    if image_size is not None:
        vision["image_size"] = image_size
    if patch_dropout or vision.get("patch_dropout"):
        vision["patch_dropout"] = patch_dropout
    changed["quick_gelu"] = quick_gelu
    return changed


def lengthened(config: Mapping[str, Any], context_length: int | None) -> dict[str, Any]:
    """A copy with a longer context, in which rotary positions turn more slowly; None keeps it."""
    longer = deepcopy(dict(config))
    if context_length is None:
        return longer
    text = longer["text_cfg"]
    if rotary.KEY in longer:
        width = text["width"] // text["heads"]
        longer[rotary.KEY] = rotary.extended(
            longer[rotary.KEY], width, text["context_length"], context_length
        )
    text["context_length"] = context_length
    return longer


def instantiate(model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any]) -> nn.Module:
    """open_clip's model of that configuration, float32, with random weights; nothing is downloaded.

    Built on torch's default device, so that `with torch.device("meta")` makes one without memory.

    Goes through open_clip's own reader of export folders, so what is built is what an export's user gets.
    What open_clip does not know (`rotary`) is added afterwards.

    Raises UserError with open_clip's words where the configuration does not work, and for one that would
    run code of its own.
    """
    _refuse_code(model_cfg)
    plain_cfg = {key: value for key, value in model_cfg.items() if key != rotary.KEY}
    with tempfile.TemporaryDirectory() as folder, quiet():
        text = json.dumps({"model_cfg": plain_cfg, "preprocess_cfg": dict(preprocess_cfg)})
        (Path(folder) / "open_clip_config.json").write_text(text)
        try:
            model = open_clip.create_model(
                f"local-dir:{folder}",
                device=torch.get_default_device(),
                load_weights=False,
                pretrained_image=False,
                pretrained_text=False,
            )
        except (TypeError, KeyError, RuntimeError, ImportError, OSError, AssertionError) as error:
            raise UserError(
                f"open_clip cannot build this architecture: {type(error).__name__}: {error}"
            ) from error
    assert isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP), (
        f"not a dual encoder: {type(model).__name__}"
    )
    if rotary.KEY in model_cfg:
        rotary.turn(model, model_cfg[rotary.KEY])
    return model


def _refuse_code(model_cfg: Mapping[str, Any]) -> None:
    text = model_cfg.get("text_cfg")
    given = text.get("tokenizer_kwargs") if isinstance(text, Mapping) else None
    strangers = sorted(set(given or {}) - _TOKENIZER_OPTIONS)
    if strangers:
        raise UserError(
            f"This model's configuration wants a tokenizer with {', '.join(strangers)}, which could run code "
            f"from its folder; longclip passes on {', '.join(sorted(_TOKENIZER_OPTIONS))}: take the others "
            "out of text_cfg.tokenizer_kwargs if you trust it without them"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without open_clip's log lines, which say of every model built here that it has no weights.

    The handler keeps open_clip's bare `logging.info` from configuring the root logger as a side effect.
    """
    handler, before = logging.NullHandler(), logging.root.manager.disable
    logging.root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(handler)
