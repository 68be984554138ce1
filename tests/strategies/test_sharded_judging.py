"""Judging calls parts of the towers on their own, whatever holds their weights."""

from types import SimpleNamespace

import torch
from processes import spawn
from tiny import TINY
from torch.distributed.device_mesh import init_device_mesh

from longclip.strategies.sharding import prepare
from longclip.strategies.states import whole_weights
from longclip.towers import configs
from longclip.towers.answers import embed_images
from longclip.towers.clip import DualTower
from longclip.towers.pretrained import Backbone

PREPROCESS = {
    "size": 24,
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "resize_mode": "shortest",
    "interpolation": "bicubic",
}


def parts(tower):
    """Features of a caption and of an image, without the tower's own forward."""
    pixels_BCHW = torch.full((1, 3, 24, 24), 7, dtype=torch.uint8)
    image_BE, patches_BPE = embed_images(tower, pixels_BCHW, frozenset({"patches"}))
    return {"text": tower.encode_captions(["A red dog."]), "image": image_BE, "patches": patches_BPE}


def sharded():
    torch.manual_seed(0)
    from longclip.data.scenes import default_tokenizer

    model = configs.instantiate(TINY, PREPROCESS)
    tower = DualTower(Backbone(model, TINY, PREPROCESS, default_tokenizer())).eval()
    with torch.no_grad():
        wanted = parts(tower)
        prepare(tower, [], init_device_mesh("cpu", (2,)))
        trainer = SimpleNamespace(strategy=None, lightning_module=SimpleNamespace(tower=tower))
        with whole_weights(trainer):
            found = parts(tower)
        kept = sum(p.to_local().numel() for p in tower.parameters())
        tower.backbone.token_embedding.weight.to_local().normal_()
        with whole_weights(trainer):
            moved = parts(tower)["text"] - wanted["text"]
    differences = {name: found[name] - wanted[name] for name in wanted}
    return {**differences, "kept": torch.tensor(kept), "moved": moved}


def test_split_towers_are_whole_while_they_are_judged(tmp_path):
    whole = sum(p.numel() for p in configs.instantiate(TINY, PREPROCESS).parameters())
    for found in spawn(sharded, 2, tmp_path):
        assert found.pop("kept") < 0.6 * whole
        assert found.pop("moved").abs().max() > 1e-3, "weights of an earlier judgement"
        for name, difference in found.items():
            assert difference.abs().max() < 1e-6, name
