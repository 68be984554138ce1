"""Weights into a model: tensors under whatever names and lengths go in, nothing silent comes out.

`load` is strict about names and shapes. What may change before is small and logged: names of the older
layout, the text position table by rule, the image position table on request.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import open_clip
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from torch import Tensor, nn

from ..types import UserError
from .configs import quiet
from .positions import resize
from .rotary import KEY

log = logging.getLogger(__name__)

_TABLES = ("positional_embedding", "text.positional_embedding")
_IMAGE_TABLE = "visual.positional_embedding"
# Index buffers that old releases of transformers saved and newer ones compute.
_OBSOLETE = ("text.transformer.embeddings.position_ids",)


def table_length(tensors: Mapping[str, Tensor]) -> int | None:
    """The context length that the weights were made for; None where they hold no text position table."""
    found_LD = table(tensors)
    return None if found_LD is None else found_LD.shape[0]


def table(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The text position table of the weights; None where they hold none."""
    return next((tensors[name] for name in _TABLES if name in tensors), None)


def renamed(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that this model's class has for them."""
    fitted = dict(tensors)
    if isinstance(model, open_clip.CustomTextCLIP) and "positional_embedding" in fitted:
        fitted = convert_to_custom_text_state_dict(fitted)
    expected = model.state_dict()
    for name in _OBSOLETE:
        if name in fitted and name not in expected:
            log.info("left out: %s, which the transformers library now computes", name)
            del fitted[name]
    for name in ("logit_scale", "logit_bias"):
        if name in fitted and name in expected and fitted[name].numel() == expected[name].numel():
            fitted[name] = fitted[name].reshape(expected[name].shape)  # a scalar in some files, [1] in others
    return fitted


def resized_text(
    model: nn.Module, tensors: Mapping[str, Tensor], method: str, keep: int
) -> dict[str, Tensor]:
    """With the text position table at the model's own length. Raises UserError as `positions.resize`."""
    fitted, expected = dict(tensors), model.state_dict()
    if any(name.endswith(KEY) for name in expected):  # all of its positions follow from its configuration
        return fitted | {name: x for name, x in expected.items() if name in _TABLES or name.endswith(KEY)}
    for name in _TABLES:
        if name not in fitted or name not in expected or fitted[name].ndim != 2:
            continue
        have, wanted = fitted[name].shape[0], expected[name].shape[0]
        if have == wanted or fitted[name].shape[1] != expected[name].shape[1]:
            continue
        if isinstance(model, open_clip.CustomTextCLIP) and model.text.cls_emb is not None:
            raise UserError(
                "This text tower's table ends in a class token's position, which cannot be lengthened."
            )
        fitted[name] = resize(fitted[name], wanted, method, keep)
        log.info("text positions: %d rows became %d by %s (keep %d)", have, wanted, method, keep)
    return fitted


def resized_image(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the image position table at the model's grid, by open_clip's bicubic resampling."""
    fitted, expected = dict(tensors), model.state_dict().get(_IMAGE_TABLE)
    if expected is not None and _IMAGE_TABLE in fitted and fitted[_IMAGE_TABLE].shape != expected.shape:
        have = fitted[_IMAGE_TABLE].shape[0]
        with quiet():
            resize_pos_embed(fitted, model)
        log.info(
            "image positions: %d rows became %d (open_clip's bicubic resampling)", have, expected.shape[0]
        )
    return fitted


def load(model: nn.Module, tensors: Mapping[str, Tensor], label: str) -> None:
    """Copy the tensors into the model, in place. Raises UserError where a name or shape is not its own."""
    expected = model.state_dict()
    wrong = [
        f"{name} is {list(tensors[name].shape)} there and {list(tensor.shape)} here"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    missing = [name for name in expected if name not in tensors]
    left_over = [name for name in tensors if name not in expected]
    if wrong or missing or left_over:
        found = [_some("another shape", wrong), _some("missing", missing), _some("left over", left_over)]
        resizable = (
            not missing and not left_over and [text.startswith(_IMAGE_TABLE) for text in wrong] == [True]
        )
        hint = " Only the image size differs: set image_size, and the table is resized." if resizable else ""
        raise UserError(
            f"{label} is a checkpoint of another architecture than the one asked for: "
            f"{'; '.join(part for part in found if part)}.{hint}"
        )
    model.load_state_dict(dict(tensors))


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what}: {', '.join(names[:5])}{more}"
