"""Images with hidden patches: exactly those that their draws say, and nothing of what is hidden."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from longclip.captions import Groups, Whole
from longclip.data.loading import Sample, blank, collate, draw
from longclip.towers.answers import embed_masked
from longclip.towers.clip import DualTower
from longclip.towers.glimpse import Glimpse, encode_glimpse
from longclip.towers.pretrained import build
from longclip.types import UserError

MASKED = frozenset({"masked"})
SIDE, PATCH = 60, 12
PATCHES = (SIDE // PATCH) ** 2
DRAWS = np.array([5, 6, 7])


def tower_of(tiny, glimpse=Glimpse(), needs=MASKED, **options):
    torch.manual_seed(0)
    tower = DualTower(build(tiny, None, 77, image_size=SIDE), glimpse=glimpse, **options)
    tower.check_needs(needs)
    if tower.hidden_D is not None:
        tower.hidden_D.data.normal_()
    return tower


def seen(draw, hidden):
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(int(draw)))
    return sorted(order[: max(1, round((1 - hidden) * PATCHES))].tolist())


def by_hand(visual, image_CHW, shown, token_D):
    """One image, one patch after the other."""
    rows = [visual.class_embedding + visual.positional_embedding[0]]
    for p in range(PATCHES):
        down, across = divmod(p, SIDE // PATCH)
        cut = image_CHW[:, down * PATCH : (down + 1) * PATCH, across * PATCH : (across + 1) * PATCH]
        patch_D = (visual.conv1.weight * cut).sum((1, 2, 3)) if p in shown else token_D
        if patch_D is not None:
            rows.append(patch_D + visual.positional_embedding[1 + p])
    x_BPD = visual.transformer(visual.ln_pre(torch.stack(rows)[None]))
    return visual.ln_post(x_BPD[0, 0]) @ visual.proj


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("hidden", [0.0, 0.3, 0.75, 0.99])
def test_features_and_gradients_are_those_of_the_patches_that_are_seen(tiny, replace, hidden):
    tower = tower_of(tiny, Glimpse(hidden, replace)).double()
    visual, token_D = tower.backbone.visual, tower.hidden_D
    pixels = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)
    found = encode_glimpse(visual, pixels, DRAWS, hidden, token_D)
    wanted = torch.stack(
        [by_hand(visual, x, seen(d, hidden), token_D) for x, d in zip(pixels, DRAWS, strict=True)]
    )
    torch.testing.assert_close(found, wanted)
    leaves = [*visual.parameters(), *([] if token_D is None else [token_D])]
    direction = torch.randn_like(found)
    ours, theirs = (
        torch.autograd.grad((x * direction).sum(), leaves, materialize_grads=True) for x in (found, wanted)
    )
    torch.testing.assert_close(ours, theirs)
    if token_D is not None:
        assert ours[-1].any() == (hidden > 0)


@pytest.mark.parametrize("replace", [True, False])
def test_what_is_hidden_does_not_tell(tiny, replace):
    tower = tower_of(tiny, Glimpse(0.75, replace))
    pixels = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    before = embed_masked(tower, pixels, DRAWS)
    for hide, same in ((True, True), (False, False)):
        poisoned = pixels.clone()
        shown = seen(DRAWS[1], 0.75)
        p = next(p for p in range(PATCHES) if (p not in shown) == hide)
        down, across = divmod(p, SIDE // PATCH)
        poisoned[1, :, down * PATCH : (down + 1) * PATCH, across * PATCH : (across + 1) * PATCH] ^= 255
        after = embed_masked(tower, poisoned, DRAWS)
        assert torch.equal(after[1], before[1]) == same
        assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_with_nothing_hidden_it_is_the_image(tiny):
    for replace in (True, False):
        tower = tower_of(tiny, Glimpse(0.0, replace))
        pixels = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
        wanted = tower.encode_image(pixels)
        torch.testing.assert_close(embed_masked(tower, pixels, DRAWS[:2]), wanted, atol=1e-6, rtol=0)


def test_a_batch_in_chunks_hides_the_same_patches(tiny):
    tower = tower_of(tiny)
    groups = Groups({"long": Whole()}, seed=0)
    batch = blank(5, 1, SIDE, tower.tokenizer)
    pixels = torch.randint(0, 256, batch.pixels_BCHW.shape, dtype=torch.uint8)
    batch = batch._replace(pixels_BCHW=pixels, draws_B=torch.arange(5))
    whole = tower(batch, groups.slots, MASKED)
    parts = tower(batch, groups.slots, MASKED, micro_batch=2)
    torch.testing.assert_close(parts.masked_BE, whole.masked_BE)
    torch.testing.assert_close(whole.masked_BE, embed_masked(tower, pixels, np.arange(5)))
    torch.testing.assert_close(whole.masked_BE.norm(dim=-1), torch.ones(5))
    assert not torch.allclose(whole.masked_BE, whole.image_BE, atol=1e-3)
    assert tower(batch, groups.slots).masked_BE is None


def test_draws_are_the_samples_own(tiny):
    first, later, other = draw("1/0/a"), draw("1/1/a"), draw("1/0/b")
    assert len({first, later, other}) == 3
    assert draw("1/0/a") == first
    tokenizer = build(tiny, None, 77).tokenizer
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    batch = collate([Sample("a", image, (None,), draw=first), Sample("b", image, (None,))], tokenizer)
    assert batch.draws_B.tolist() == [first, 0]


def test_the_token_trains_and_is_not_exported(tiny):
    tower = tower_of(tiny)
    assert "hidden_D" in dict(tower.named_parameters())
    assert not any("hidden" in name for name in tower.backbone.state_dict())
    assert tower_of(tiny, Glimpse(replace=False)).hidden_D is None
    assert tower_of(tiny, needs=frozenset()).hidden_D is None, "no term reads it"


def test_other_towers_and_shares_are_refused(tiny):
    with pytest.raises(UserError, match=r"model\.glimpse\.hidden is 1\.0"):
        tower_of(tiny, Glimpse(1.0))
    tower = tower_of(tiny, needs=frozenset())
    tower.backbone.visual = torch.nn.Identity()
    with pytest.raises(UserError, match="is a Identity"):
        tower.check_needs(MASKED)


def test_normalised_features_of_masked_images_are_float32(tiny):
    tower = tower_of(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        found = embed_masked(tower, torch.zeros(3, 3, SIDE, SIDE, dtype=torch.uint8), DRAWS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.normalize(found, dim=-1))
