"""What terms may ask of the towers beyond global features, and what towers must be to give it.

In: a `DualTower` and the names that its terms' `needs` hold. Out: the same tower, ready to answer
(`answers`), or a sentence why it cannot.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..types import UserError
from .cached import check_cached
from .corners import first_corners
from .experts import join
from .glimpse import check_glimpses
from .image import check_patches
from .start import frozen

if TYPE_CHECKING:
    from .clip import DualTower

log = logging.getLogger(__name__)

NEEDS = frozenset({"patches", "masked", "words", "corners", "routing", "start"})
"""Fields of `Embeddings`, less their axes."""


def make_ready(tower: DualTower, needs: frozenset[str]) -> None:
    """Make what answering takes, in place, before anything is trained or loaded.

    Raises:
        UserError: these towers cannot give it.
    """
    assert needs <= NEEDS, f"towers give {sorted(NEEDS)}, a term asks for {sorted(needs)}"
    check_cached(tower, needs)
    if "patches" in needs:
        check_patches(tower.backbone.visual)
    if "masked" in needs:
        check_glimpses(tower.backbone.visual, tower.glimpse)
        if tower.glimpse.replace and tower.hidden_D is None:
            tower.hidden_D = nn.Parameter(torch.zeros(tower.backbone.visual.conv1.out_channels))
    if {"words", "corners"} & needs and tower.padded_because:
        raise UserError(
            "a term of this recipe reads every token of a caption, which this text tower does not give: "
            f"{tower.padded_because}; choose open_clip's own (model.backbone.architecture=ViT-B-16)"
        )
    if "corners" in needs and tower.corners_MD is None:
        tower.corners_MD = nn.Parameter(first_corners(tower.backbone, tower.tokenizer, tower.corners))
    if "start" in needs and not tower.start:
        if tower.random:
            log.warning(
                "a term holds on to the weights that the run starts with, and these are random: "
                "model.backbone.weights names better ones"
            )
        tower.start.append(frozen(tower, tower.published))
    if "routing" in needs:  # behind the start, which has no experts
        join(tower.backbone, tower.experts)
