"""The sigmoid loss: against open_clip's, against a loop."""

import dataclasses
import math

import torch
from open_clip.loss import SigLipLoss
from torch.nn.functional import normalize

from longclip.objectives import Sigmoid


def test_equals_open_clip_for_one_caption(embed):
    text = normalize(torch.randn(6, 1, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    e = dataclasses.replace(embed(slots=1), text_BKE=text, mask_BK=torch.ones(6, 1, dtype=torch.bool))
    term = Sigmoid("sub")
    want = SigLipLoss()(e.image_BE, text[:, 0], term.logit_scale.exp(), term.logit_bias)
    torch.testing.assert_close(term(e).value, want)


def test_equals_a_loop_over_pairs(embed):
    e, term = embed(), Sigmoid("sub", bias=-3)
    total = 0.0
    for b in range(6):
        for j, k in e.mask_BK.nonzero().tolist():
            logit = 10 * float(e.image_BE[b].double() @ e.text_BKE[j, k].double()) - 3
            total += math.log1p(math.exp(-logit if b == j else logit))
    assert math.isclose(term(e).value.item(), total / 6, rel_tol=1e-5)


def test_absent_captions_change_nothing(embed):
    e, term = embed(), Sigmoid("sub")
    poisoned = dataclasses.replace(e, text_BKE=torch.where(e.mask_BK[..., None], e.text_BKE, 50.0))
    torch.testing.assert_close(term(e).value, term(poisoned).value)


def test_temperature_and_offset_learn(embed):
    term = Sigmoid("sub")
    term(embed()).value.backward()
    assert all(parameter.grad.abs() > 0 for parameter in term.parameters())
    assert set(dict(term.named_parameters())) == {"logit_scale", "logit_bias"}
