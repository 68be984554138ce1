"""The optimiser: who decays, who never moves, and a schedule that is a pure function of samples."""

import math

import pytest
import torch
from open_clip.model import CLIP
from torch import nn

from longclip.objectives import Grouping
from longclip.optim import LN_100, AdamW, clamp_temperatures, parameter_groups, schedule
from longclip.types import UserError


def model():
    return CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        text_cfg={"context_length": 8, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1},
    )


def test_only_matrices_decay():
    module = nn.ModuleDict({"clip": model(), "term": Grouping("sub")})
    decay, exempt = parameter_groups(module, 0.2)
    names = {id(p): n for n, p in module.named_parameters()}
    assert decay["weight_decay"] == 0.2
    assert exempt["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decay["params"])
    kept = {names[id(p)] for p in exempt["params"]}
    for name in ("clip.positional_embedding", "clip.visual.positional_embedding", "clip.logit_scale",
                 "clip.visual.class_embedding", "term.logit_scale", "clip.ln_final.weight",
                 "clip.visual.ln_pre.bias"):  # fmt: skip
        assert name in kept, name
    assert len(decay["params"]) + len(exempt["params"]) == len(list(module.parameters()))


def test_frozen_parameters_are_not_given_to_the_optimizer():
    module = model()
    module.lock_image_tower()
    known = {id(p) for group in parameter_groups(module, 0.1) for p in group["params"]}
    assert not any(id(p) in known for p in module.visual.parameters())


def test_schedule_by_hand():
    assert schedule(0, 100, 1100) == 0
    assert schedule(50, 100, 1100) == 0.5
    assert schedule(100, 100, 1100) == 1
    assert schedule(600, 100, 1100) == pytest.approx(0.5)
    assert schedule(1100, 100, 1100) == pytest.approx(0)
    assert schedule(5000, 100, 1100, floor=0.1) == pytest.approx(0.1)
    assert schedule(0, 0, 10) == 1


def test_temperatures_stay_between_1_and_100_wherever_they_live():
    module = nn.ModuleDict({"clip": model(), "term": Grouping("sub")})
    with torch.no_grad():
        module["clip"].logit_scale.fill_(9.0)
        module["term"].logit_scale.fill_(-3.0)
    clamp_temperatures(module)
    assert module["clip"].logit_scale.item() == pytest.approx(LN_100)
    assert module["term"].logit_scale.item() == 0
    assert math.log(100) == LN_100


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"lr": 0}, "optim.lr"), ({"warmup": 2000}, "optim.warmup"), ({"warmup": -1}, "warmup")],
)
def test_settings_that_make_no_sense_are_a_sentence(wrong, word):
    with pytest.raises(UserError, match=word):
        AdamW(**{"lr": 1e-3, "warmup": 10, "samples": 1000, **wrong})
