"""Pictures and texts of one's own: the same features as from the functions that the forward calls."""

import torch

from longclip.towers.asking import ask
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import build

TEXTS = ["a red cup", "word " * 300, ""]


def test_features_are_those_of_the_encoders_and_cuts_are_counted(tiny):
    tower = DualTower(build(tiny, None, 248)).eval()
    pixels_BCHW = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        found, dropped_S = ask(tower, pixels_BCHW, TEXTS)
        assert (found.image_BE - tower.encode_image(pixels_BCHW)).abs().max() < 1e-6
        assert (found.text_BKE[0] - tower.encode_captions(TEXTS)).abs().max() < 1e-6
        alone, _ = ask(tower, pixels_BCHW, needs=frozenset({"patches"}))
    assert dropped_S.tolist() == [0, 300 - 246, 0]
    assert torch.equal(alone.image_BE.isfinite(), torch.ones(3, 32, dtype=torch.bool))
    assert alone.patches_BPE.shape == (3, 4, 32)
    assert not alone.mask_BK.any()
