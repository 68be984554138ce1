"""Pointing: sentences without a place for them to point at."""

import pytest
import torch

from longclip.evaluate import Pointing
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build
from longclip.types import UserError


def test_a_tower_without_patches_is_refused_in_a_sentence(tiny):
    tower = DualTower(build(tiny, None, 248))
    tower.backbone.visual = torch.nn.Flatten()
    with pytest.raises(UserError, match=r"a Flatten without patch tokens .* without pointing"):
        Pointing("heldout")(tower, None)
