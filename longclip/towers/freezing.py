"""What stays as it is while a model trains.

In: a model of open_clip's. Out: the same, in place, with parameters that have no gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..types import UserError
from .positions import text_module


class Freeze(NamedTuple):
    """What stays as it is, in open_clip's vocabulary.

    `image_groups` / `text_layers` count the last groups (layers) that stay trainable in a locked tower.
    `only`: nothing but this and the temperature trains of what is not locked: "mlps", those of the blocks.
    """

    image: bool = False
    image_groups: int = 0
    image_bn_stats: bool = False
    text: bool = False
    text_layers: int = 0
    only: str | None = None


def lock(model: Any, freeze: Freeze) -> None:
    """Let nothing train that is to stay, in place.

    Raises:
        UserError: nothing is left.
    """
    if freeze.image:
        model.lock_image_tower(unlocked_groups=freeze.image_groups, freeze_bn_stats=freeze.image_bn_stats)
    if freeze.text:
        model.lock_text_tower(unlocked_layers=freeze.text_layers)
        # open_clip's lock does not see a table that is split in two (positions.freeze_head).
        if freeze.text_layers <= _text_layers(model):
            for name, parameter in model.named_parameters():
                if "positional_embedding.original" in name:
                    parameter.requires_grad_(False)
    if freeze.only is not None:
        _lock_all_but(model, freeze.only)
    if not any(p.requires_grad for name, p in model.named_parameters() if "logit_" not in name):
        raise UserError(
            "everything is frozen: nothing would train; lift model.freeze.image, model.freeze.text or "
            "model.freeze.only"
        )


def _lock_all_but(model: Any, kept: str) -> None:
    if kept != "mlps":
        raise UserError(f"model.freeze.only is {kept!r}; it is mlps, or null for all that is not locked")
    for name, parameter in model.named_parameters():
        *path, _ = name.split(".")
        in_block = any(part.isdigit() for part in path)
        if not (in_block and "mlp" in path) and "logit_" not in name:
            parameter.requires_grad_(False)


def _text_layers(model: Any) -> int:
    text: Any = text_module(model)
    return len(text.transformer.resblocks)
