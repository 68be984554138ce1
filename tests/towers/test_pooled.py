"""The last image block for the class token alone: the same features and gradients for less work."""

import copy

import pytest
import torch
from open_clip.model import CLIP
from torch.utils.flop_counter import FlopCounterMode

from longclip.towers.image import encode_patches
from longclip.towers.pooled import pool_alone

TEXT = {"context_length": 8, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 48, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}


def towers(**vision):
    """open_clip's tower, and a copy that pools alone."""
    torch.manual_seed(0)
    theirs = CLIP(embed_dim=32, vision_cfg={**VISION, **vision}, text_cfg=TEXT).visual
    ours = copy.deepcopy(theirs)
    pool_alone(ours)
    return ours, theirs


def with_gradients(visual, pixels):
    features_BE = visual(pixels)
    features_BE.square().sum().backward()
    return features_BE, {name: p.grad for name, p in visual.named_parameters()}


def assert_same(ours, theirs):
    pixels = torch.randn(2, 3, 48, 48)
    (found, gradients), (expected, right) = with_gradients(ours, pixels), with_gradients(theirs, pixels)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, right[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"ls_init_value": 0.1},
        {"final_ln_after_pool": True},
        {"pool_type": "avg"},
        {"attentional_pool": True},
    ],
    ids=lambda vision: "-".join(vision) or "class-token",
)
def test_features_and_gradients_are_the_whole_towers(vision):
    assert_same(*towers(**vision))


def test_recomputed_blocks_give_the_same_gradients():
    ours, theirs = towers()
    ours.set_grad_checkpointing(True)
    assert_same(ours, theirs)


def test_most_of_the_last_block_is_saved():
    def work(visual):
        with FlopCounterMode(display=False) as counter:
            visual(torch.randn(2, 3, 48, 48))
        return counter.get_total_flops()

    ours, theirs = map(work, towers())
    assert ours < 0.77 * theirs  # of three blocks, one less 20 of its 24 D^2


def test_patches_are_all_there_where_they_are_asked_for():
    ours, theirs = towers()
    ours.set_grad_checkpointing(True)
    pixels = torch.randn(2, 3, 48, 48)
    found, expected = encode_patches(ours, pixels), encode_patches(theirs, pixels)
    for mine, right in zip(found, expected, strict=True):
        assert torch.equal(mine, right)
    found[1].sum().backward()  # the blocks that are made again know it, too
    assert ours.forward_intermediates(pixels)["image_intermediates"][-1].shape == (2, 64, 6, 6)


def test_a_copy_walks_through_its_own_blocks():
    ours, _ = towers()
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.transformer.resblocks[0].mlp.c_fc.bias.add_(1)
    pixels = torch.randn(1, 3, 48, 48)
    assert not torch.equal(ours(pixels), other(pixels))
