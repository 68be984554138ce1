"""Noise probabilities: from a column, from a mixture of losses, and what they do to a caption's target."""

import dataclasses

import pytest
import torch
from torch.nn.functional import log_softmax

from longclip.objectives import Contrastive
from longclip.objectives.noise import Mixture, NoiseAdaptive
from longclip.types import UserError


def loop(e, omega_B):
    """Cross-entropy against soft targets, one caption at a time, in float64."""
    image, text, scale = e.image_BE.double(), e.text_BKE.double(), e.scale.double()
    losses = []
    for b, k in e.mask_BK.nonzero().tolist():
        present = e.mask_BK[:, k].nonzero().flatten().tolist()
        sides = [(scale * text[present, k] @ image[b], present.index(b)), (scale * image @ text[b, k], b)]
        for logits, own in sides:
            target = torch.full_like(logits, omega_B[b] / len(logits))
            target[own] += 1 - omega_B[b]
            losses.append(-(target * log_softmax(logits, 0)).sum())
    return torch.stack(losses).mean()


def test_a_column_of_probabilities_softens_targets_as_a_loop_does(embed):
    e = embed()
    e = dataclasses.replace(e, image_BE=e.image_BE.requires_grad_(), text_BKE=e.text_BKE.requires_grad_())
    noise = torch.tensor([0.0, 1.0, 0.5, torch.nan, 0.2, 0.9])
    e = dataclasses.replace(e, columns={"noise": noise})
    term = NoiseAdaptive("sub", column="noise", strength=0.4)
    got, want = term(e).value, loop(e, 0.4 * noise.nan_to_num(0).double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    for leaf in (e.image_BE, e.text_BKE):
        grads = [torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert term.columns == {"noise": 0}


def test_certain_captions_are_learned_as_ever(embed):
    e = dataclasses.replace(embed(), columns={"noise": torch.zeros(6)})
    torch.testing.assert_close(NoiseAdaptive("sub", column="noise")(e).value, Contrastive("sub")(e).value)


def test_a_missing_column_says_what_to_type(embed):
    with pytest.raises(UserError, match=r"reads the column 'noise'.*data.sidecar.columns=\[noise\]"):
        NoiseAdaptive("sub", column="noise")(embed())


def test_a_column_of_vectors_is_no_probability(embed):
    e = dataclasses.replace(embed(), columns={"teacher": torch.rand(6, 6)})
    with pytest.raises(UserError, match=r"'teacher' holds \[6\] numbers an image, not one probability"):
        NoiseAdaptive("sub", column="teacher")(e)


def losses(noisy=0.2, count=4000, seed=0):
    random = torch.Generator().manual_seed(seed)
    is_noise = torch.rand(count, generator=random) < noisy
    x = torch.where(is_noise, 4.0, 1.0) + 0.5 * torch.randn(count, generator=random)
    return x.view(-1, 2), is_noise.view(-1, 2)


def test_a_mixture_finds_the_noisy_and_how_many_they_are():
    mixture = Mixture(momentum=0.9)
    for seed in range(60):
        x, _ = losses(seed=seed)
        mixture(x, x, torch.ones_like(x, dtype=torch.bool))
    x, is_noise = losses(seed=99)
    found = mixture.eval()(x, x, torch.ones_like(x, dtype=torch.bool))
    assert ((found > 0.5) == is_noise).float().mean() > 0.98
    assert found.mean().item() == pytest.approx(0.2, abs=0.03)
    assert mixture.known.item() == pytest.approx(1 - 0.9**60)


def test_a_lower_loss_is_never_noisier():
    """A wide distribution of noise would win far below the narrow one of clean losses, too."""
    mixture = Mixture(momentum=0.5)
    random = torch.Generator().manual_seed(0)
    for _ in range(30):
        x = torch.cat(
            [1 + 0.1 * torch.randn(150, generator=random), 4 + 3 * torch.randn(100, generator=random)]
        )
        mixture(x, x[:, None], torch.ones(250, 1, dtype=torch.bool))
    found = mixture.eval()(torch.linspace(-20, 20, 400), x[:, None], torch.ones(250, 1, dtype=torch.bool))
    assert (found.diff() >= -1e-6).all()
    assert found[0] < 0.1 < 0.9 < found[-1]


def test_absent_captions_teach_a_mixture_nothing():
    x, _ = losses(count=400)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    clean, poisoned = Mixture(0.9), Mixture(0.9)
    clean(x, x, mask)
    poisoned(x, torch.where(mask, x, torch.inf), mask)
    assert torch.equal(clean.moments.total, poisoned.moments.total)
    assert clean.moments.total.isfinite().all()
    before = clean.moments.total.clone()
    assert clean(x, x, torch.zeros_like(mask)).isfinite().all()
    assert torch.equal(before, clean.moments.total)


@pytest.mark.parametrize("value", [1.0, 3.0])
def test_losses_that_are_all_alike_give_numbers(value):
    x = torch.full((8, 1), value)
    mixture = Mixture(0.9)
    for _ in range(3):
        assert mixture(x, x, torch.ones_like(x, dtype=torch.bool)).isfinite().all()


def test_estimated_noise_grows_in_from_nothing(embed):
    """At the first step nobody knows a noisy pair, and the loss is nearly the plain one."""
    e, plain = embed(), Contrastive("sub")(embed()).value
    term = NoiseAdaptive("sub", momentum=0.99)
    first = (term(e).value - plain).abs()
    for _ in range(50):
        later = (term(e).value - plain).abs()
    assert first < 0.2 * later
    assert set(term.state_dict()) == {"mixture.moments.total", "mixture.moments.weight"}


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="strength is 1"):
        NoiseAdaptive("sub", strength=1.0)
